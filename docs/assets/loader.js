// Everything the pages do in the browser. A classic script, so that it also works from file://; it loads only files of this site.
(() => {
const root = new URL('..', document.currentScript.src), $ = (s, at = document) => at.querySelector(s), all = (s, at = document) => [...at.querySelectorAll(s)]
const load = path => new Promise((ok, fail) => { const s = document.createElement('script'); s.src = new URL(path, root); s.onload = ok; s.onerror = () => fail(new Error(`${path} did not load`)); document.head.append(s) })
const html = document.documentElement, dark = () => (html.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark'
const repaint = []                                          // what to do when the theme changes

// theme
$('.theme').onclick = () => { html.dataset.theme = dark() ? 'light' : 'dark'; try { localStorage.setItem('lm-theme', html.dataset.theme) } catch (e) {} repaint.forEach(f => f()) }
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => html.dataset.theme || repaint.forEach(f => f()))

// chapters on a phone; the chapter's place in the list
const menu = $('.menu'), button = $('.menu-button'), open = on => { document.body.classList.toggle('menu-open', on); button.setAttribute('aria-expanded', on) }
button.onclick = e => { e.stopPropagation(); open(!document.body.classList.contains('menu-open')) }
document.addEventListener('click', e => menu.contains(e.target) || open(false))
const here = $('[aria-current]', menu); if (here) menu.scrollTop = here.offsetTop - menu.clientHeight / 2

// the heading being read
const links = new Map(all('nav.toc a').map(a => [decodeURIComponent(a.hash.slice(1)), a])), heads = [...links.keys()].map(id => document.getElementById(id)).filter(Boolean)
const mark = () => { let at = heads[0]; for (const h of heads) if (h.getBoundingClientRect().top < 130) at = h; links.forEach(a => a.classList.toggle('at', at && a === links.get(at.id))) }
if (heads.length) { addEventListener('scroll', () => requestAnimationFrame(mark), { passive: true }); mark() }

// copy buttons
const copied = async text => { try { await navigator.clipboard.writeText(text) } catch (e) { const t = document.createElement('textarea'); t.value = text; document.body.append(t); t.select(); document.execCommand('copy'); t.remove() } }
for (const box of all('article .code')) {
  const b = document.createElement('button'); b.className = 'copy'; b.textContent = 'Copy'; box.append(b)
  b.onclick = async () => { await copied($('pre', box).textContent); b.textContent = 'Copied'; setTimeout(() => b.textContent = 'Copy', 1500) }
}

// search: words and prefixes in titles, headings and text
const input = $('.search input'), results = $('.results'), esc = s => s.replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`)
let index, at = -1
const ready = () => index ||= load('search.js').then(() => LM_SEARCH.map(([title, head, url, text]) => ({ title, head, url, text, low: [head, title, text].map(s => s.toLowerCase()) })))
const score = (e, words) => {
  let sum = 0
  for (const w of words) {
    const [head, title, text] = e.low, name = head.split('.').pop()
    const s = (head === w || name === w ? 60 : head.startsWith(w) ? 30 : head.includes(w) ? 18 : 0) + (title.includes(w) ? 6 : 0) + (text.includes(w) ? 1 + Math.min(4, text.split(w).length / 3) : 0)
    if (!s) return 0
    sum += s
  }
  return sum + (e.url.startsWith('api/') ? 0 : 2)
}
const snippet = (e, words) => {
  const i = Math.max(0, e.low[2].indexOf(words.find(w => e.low[2].includes(w)) ?? '') - 40), cut = (i ? '…' : '') + e.text.slice(i, i + 150)
  return esc(cut).replace(new RegExp(words.map(w => esc(w).replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('|'), 'gi'), m => `<mark>${m}</mark>`)
}
const search = async () => {
  const q = input.value.trim(), words = q.toLowerCase().split(/\s+/).filter(Boolean), entries = await ready()
  if (q !== input.value.trim()) return
  const hits = entries.map(e => [score(e, words), e]).filter(h => h[0] > 0).sort((a, b) => b[0] - a[0]).slice(0, 12)
  results.innerHTML = hits.map(([, e]) => `<a href="${esc(new URL(e.url, root).href)}">${esc(e.head)}${e.head === e.title ? '' : ` <small>${esc(e.title)}</small>`}<small>${snippet(e, words)}</small></a>`).join('') || '<p>Nothing found.</p>'
  results.hidden = !words.length; at = -1
}
input.onfocus = ready; input.oninput = search
input.onkeydown = e => {
  const hits = all('a', results)
  if (e.key === 'Escape') { input.value = ''; results.hidden = true; input.blur() }
  if (e.key === 'Enter' && hits.length) hits[Math.max(at, 0)].click()
  if (e.key === 'ArrowDown' || e.key === 'ArrowUp') { e.preventDefault(); at = (at + (e.key === 'ArrowDown' ? 1 : -1) + hits.length) % hits.length; hits.forEach((h, i) => h.classList.toggle('at', i === at)); hits[at]?.scrollIntoView({ block: 'nearest' }) }
}
document.addEventListener('click', e => $('.search').contains(e.target) && !e.target.closest('.results a') || (results.hidden = true))
document.addEventListener('keydown', e => { if (e.key === '/' && !/INPUT|TEXTAREA|SELECT/.test(e.target.tagName)) { e.preventDefault(); input.focus() } })

const macros = { '½': '\\tfrac{1}{2}', '¼': '\\tfrac{1}{4}', '¾': '\\tfrac{3}{4}' }

// formulas; then go again to the equation that the address names, since heights have changed
const formulas = all('.math')
if (formulas.length) load('vendor/katex/katex.min.js').then(() => {
  for (const el of formulas) { katex.render(el.textContent, el, { displayMode: el.classList.contains('display'), throwOnError: false, macros: { ...macros } }); el.classList.add('done') }
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView()
})

// figures: Plotly's JSON in the colors and the width of the page
const figures = all('.lm-plotly')
const paint = (el, full, own) => {
  const c = getComputedStyle(el), line = c.borderTopColor, out = { paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', 'font.color': c.color, 'font.family': getComputedStyle($('.menu')).fontFamily, 'legend.bgcolor': 'rgba(0,0,0,0)' }
  for (const k of Object.keys(full)) if (/^[xy]axis\d*$/.test(k)) Object.assign(out, { [`${k}.gridcolor`]: line, [`${k}.zerolinecolor`]: line, [`${k}.linecolor`]: line, [`${k}.automargin`]: true })
  if (el.clientWidth < 520) {                               // on a phone the legend stands below the figure, which grows by as much
    Object.assign(out, { 'margin.l': 45, 'margin.r': 12, 'title.font.size': 14 })
    for (const k of Object.keys(full)) if (/^[xy]axis\d*$/.test(k)) out[`${k}.title.font.size`] = 12
    const rows = full.showlegend ? el._fullData.filter(t => t.showlegend && t.visible === true).length : 0
    if (rows) Object.assign(out, { 'legend.orientation': 'v', 'legend.x': 0, 'legend.xanchor': 'left', 'legend.yref': 'container', 'legend.y': 0, 'legend.yanchor': 'bottom', 'margin.b': 66 + 20 * rows, height: (own.height || 400) + 20 * rows })
  }
  return out
}
if (figures.length) load('vendor/plotly/plotly-cartesian.min.js').then(() => figures.map(async el => {
  const { data, layout, frames } = JSON.parse($('script', el).textContent), own = structuredClone(layout), color = () => Plotly.relayout(el, paint(el, el._fullLayout, own))
  delete layout.width; layout.margin ??= { t: layout.title?.text ? 56 : 24, b: 48, l: 56, r: 24 }
  await Plotly.newPlot(el, data, { ...layout, autosize: true }, { responsive: true, displaylogo: false, displayModeBar: matchMedia('(hover: hover)').matches })
  if (frames) await Plotly.addFrames(el, frames)
  await color(); el.dataset.done = 1; repaint.push(color)
}))

// diagrams
const diagrams = all('pre.mermaid').map(el => [el, el.textContent])
if (diagrams.length) load('vendor/mermaid/mermaid.tiny.js').then(() => {
  const draw = async () => {
    mermaid.initialize({ startOnLoad: false, securityLevel: 'strict', theme: dark() ? 'dark' : 'neutral', fontFamily: getComputedStyle($('.menu')).fontFamily })
    for (const [i, [el, text]] of diagrams.entries()) el.innerHTML = (await mermaid.render(`diagram${i}`, text)).svg
  }
  repaint.push(draw); return draw()
})

// widgets: the same front-end module as in Jupyter, given a model that lives in the page
const model = state => {
  const s = { ...state }, heard = {}
  return { get: k => s[k], set: (k, v) => { if (s[k] !== v) { s[k] = v; (heard[`change:${k}`] || []).forEach(f => f()) } }, save_changes() {}, on: (e, f) => (heard[e] ||= []).push(f), off: (e, f) => { heard[e] = (heard[e] || []).filter(g => g !== f) } }
}
for (const el of all('.lm-widget')) {
  const { esm, state } = JSON.parse($('script', el).textContent), url = URL.createObjectURL(new Blob([esm], { type: 'text/javascript' }))
  import(url).then(m => m.default.render({ model: model(state), el })).then(() => el.dataset.done = 1, e => { el.append(`This control did not load: ${e.message}`); console.error(e) })
}
})()
