"""Packaging. Everything written by hand stands in settings.ini; this file only reads it."""
import configparser, json, re, shlex
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
STATUS = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
parser = configparser.ConfigParser(delimiters=['='])
parser.read(HERE/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']


def requirements(key): return shlex.split(cfg.get(key, ''))


def long_description():
    "README.md, its links to files of the repository made absolute for the package index."
    text = (HERE/'README.md').read_text(encoding='utf-8') if (HERE/'README.md').exists() else cfg['description']
    raw = cfg['git_url'].replace('github.com', 'raw.githubusercontent.com') + f"/{cfg['branch']}/"
    text = re.sub(r'(!\[[^\]]*\]\()(?!https?:|#)', rf'\g<1>{raw}', text)
    text = re.sub(r'(<img[^>]*\ssrc=")(?!https?:|data:)', rf'\g<1>{raw}', text)
    return re.sub(r'((?<!!)\[[^\]!]*\]\()(?!https?:|#|mailto:)', rf"\g<1>{cfg['git_url']}/blob/{cfg['branch']}/", text)


class BuildWithChapters(build_py):
    "Adds the chapters, without their outputs, as lmnotes/notebooks, so that `lmnotes notebooks DIR` works from a wheel."
    def chapters(self):
        nbs = HERE/cfg['nbs_path']
        return [p for d in ('.', 'tasks') for p in sorted((nbs/d).glob('*.ipynb')) if not p.name.startswith(('.', '_'))]

    def run(self):
        super().run()
        if self.editable_mode: return
        for src in self.chapters():
            nb = json.loads(src.read_text(encoding='utf-8'))
            for cell in nb['cells']:
                if cell['cell_type'] == 'code': cell['outputs'], cell['execution_count'] = [], None
            nb['metadata'].pop('widgets', None)
            nb['metadata'].get('lmnotes', {}).pop('hash', None)
            dst = Path(self.build_lib)/cfg['lib_path']/'notebooks'/src.relative_to(HERE/cfg['nbs_path'])
            dst.parent.mkdir(parents=True, exist_ok=True)
            dst.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


extras = {name: requirements(f'{name}_requirements') for name in ('viz', 'metrics', 'notebooks', 'dev')}
extras['all'] = sorted({r for name in ('viz', 'metrics', 'notebooks') for r in extras[name]})
minor = int(cfg['min_python'].split('.')[1])

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=long_description(),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'], 'Source': cfg['git_url']},
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    classifiers=[
        f"Development Status :: {STATUS[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f'Programming Language :: Python :: 3.{v}' for v in range(minor, 15)),
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements('requirements'),
    extras_require=extras,
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['py.typed', 'assets/**/*']},
    include_package_data=False,
    zip_safe=False,
    entry_points={
        'console_scripts': shlex.split(cfg.get('console_scripts', '')),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={'build_py': BuildWithChapters},
)
