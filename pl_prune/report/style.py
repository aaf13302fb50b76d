"""The style sheet of a report's page."""

STYLE = """
:root { --paper: #fdfdfc; --ink: #16181b; --quiet: #5b6168; --rule: #d9dbdd; --mark: #eef3f7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e9e9e6; --quiet: #a3a9b0; --rule: #363b41; --mark: #1e252c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2rem) 3rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
.lead { font-size: 1.05rem; max-width: 46rem; background: var(--mark); border-left: 4px solid #0072B2;
  padding: .7rem 1rem; margin: 1rem 0; }
.about, figcaption, .notes { color: var(--quiet); font-size: .9rem; margin: .3rem 0; }
ul { max-width: 46rem; padding-left: 1.2rem; } li { margin: .25rem 0; }
summary { cursor: pointer; font-weight: 600; margin-top: .8rem; }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { position: sticky; top: 0; z-index: 1; background: var(--mark); vertical-align: bottom; color: var(--quiet); font-weight: 600; }
th:first-child, .prose td:last-child, .prose thead th:last-child { text-align: left; }
.prose td:last-child { white-space: normal; min-width: 11rem; }
tbody th { position: sticky; left: 0; background: var(--paper); min-width: clamp(6rem, 12vw, 13rem); white-space: normal; }
tbody tr:last-child > * { border-bottom: 0; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .2rem 1rem; max-width: 46rem; }
dt { color: var(--quiet); } dd { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 2rem 2.5rem; }
figure { margin: 0; min-width: 0; max-width: 36rem; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { background: #fff; border-radius: 4px; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media print { .wide { overflow: visible; max-height: none; } }
"""
