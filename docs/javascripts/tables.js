// Tables that scroll can be scrolled by keyboard; the theme wraps them after the page has loaded.
const reachable = () => document.querySelectorAll(".md-typeset__scrollwrap").forEach(frame => { frame.tabIndex = 0 })
new MutationObserver(reachable).observe(document.documentElement, { childList: true, subtree: true })
reachable()
