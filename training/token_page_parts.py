"""The fixed parts of the page that `token_page` writes: markup, style and script."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src '$style_hash'; \
script-src '$script_hash'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>A token has the colour of the expert with the largest weight at the chosen layer, the stronger the larger its share.
Answers are underlined. Point at a token, or step through them with the arrow keys, to see the weights.</p>
<form>
<label>Layer <select id="layer"></select></label>
<span><button type="button" id="back">Previous layer</button> <button type="button" id="on">Next layer</button></span>
<label>Task <select id="task"><option value="">all</option></select></label>
<label><input type="checkbox" id="numbers"> Expert under each token</label>
</form>
<ul id="legend" aria-label="Experts of this layer, by the tokens that are mostly theirs"></ul>
</header>
<main id="texts"><noscript><p>This page needs its script.</p></noscript></main>
<div id="tip" role="status" aria-live="polite" hidden></div>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d5d5d5; --raised: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #ececec; --soft: #a9adb3; --line: #3b4047; --raised: #25292e; }
}
body { margin: 0 auto; max-width: 72rem; padding: 0 1.25rem 6rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
header { background: var(--page); border-bottom: 1px solid var(--line); padding: .75rem 0; z-index: 1; }
@media (min-width: 48rem) { header { position: sticky; top: 0; } }
h1 { font-size: 1.25rem; margin: 0; }
h2 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
header p { margin: .25rem 0 .5rem; color: var(--soft); max-width: 60rem; font-size: .9rem; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; }
select, button { font: inherit; color: inherit; background: var(--raised); border: 1px solid var(--line);
  border-radius: 4px; padding: .15rem .4rem; max-width: 24rem; }
:focus-visible { outline: 3px solid #2f7fd6; outline-offset: 1px; }
#legend { display: flex; flex-wrap: wrap; gap: .25rem .5rem; list-style: none; padding: 0; margin: .5rem 0 0;
  font-size: .85rem; }
#legend li { padding: 0 .4rem; border-radius: 4px; }
.tokens { margin: .25rem 0 .75rem; padding: .4rem .6rem; border: 1px solid var(--line); border-radius: 6px;
  line-height: 2; overflow-wrap: anywhere; }
.tokens.numbered { line-height: 2.9; }
.token { white-space: pre-wrap; unicode-bidi: isolate; border-radius: 3px; padding: .1em 0; margin: 0 1px;
  position: relative; scroll-margin: 16rem 0 4rem; }
.token.answer { text-decoration: underline; text-underline-offset: .25em; }
.numbered .token::after { content: attr(data-expert); position: absolute; left: 0; top: 2.3em; font-size: .65rem;
  line-height: 1; color: var(--soft); white-space: nowrap; }
#tip { position: fixed; z-index: 2; background: var(--raised); border: 1px solid var(--line); border-radius: 6px;
  box-shadow: 0 2px 8px rgb(0 0 0 / .25); padding: .4rem .6rem; font-size: .9rem; max-width: 22rem;
  pointer-events: none; white-space: pre-line; overflow-wrap: anywhere; }
"""

SCRIPT = """
"use strict";
(function () {
  var data = JSON.parse(document.getElementById("data").textContent);
  var layers = Object.keys(data.gates);
  var byId = function (id) { return document.getElementById(id); };
  var layer = byId("layer"), task = byId("task"), numbers = byId("numbers");
  var texts = byId("texts"), legend = byId("legend"), tip = byId("tip");
  // Okabe and Ito's colours tell eight experts apart for colour-blind readers; more of them need their numbers.
  var few = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0],
    [200, 185, 20], [120, 120, 120]];

  function make(kind, className, text) {
    var element = document.createElement(kind);
    if (className) { element.className = className; }
    if (text !== undefined) { element.textContent = text; }
    return element;
  }

  function nameOf(expert) {
    return data.experts ? data.experts[expert] : "expert " + (expert + 1);
  }

  function shade(expert, share) {
    var alpha = 0.12 + 0.48 * Math.sqrt(share);
    if (data.gates[layer.value] <= few.length) { return "rgb(" + few[expert].join(" ") + " / " + alpha + ")"; }
    return "hsl(" + (expert * 137.508) % 360 + " 75% 48% / " + alpha + ")";
  }

  function percent(share) { return (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %"; }

  function unpack(packed, shown) {
    if (packed === undefined) { return []; }
    var raw = atob(packed), tokens = [];
    var number = function (at) { return raw.charCodeAt(at) + 256 * raw.charCodeAt(at + 1); };
    for (var at = 0; at < raw.length; at += 4 * shown) {
      var routes = [];
      for (var i = 0; i < shown; i++) {
        routes.push({expert: number(at + 4 * i), share: number(at + 4 * i + 2) / 65535});
      }
      tokens.push(routes.filter(function (route) { return route.share > 0; }));
    }
    return tokens;
  }

  function listed(text) {
    var box = make("p", "tokens");
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Tokens of an example of " + text.task);
    text.tokens.forEach(function (token, index) {
      var shown = token.replace(/\\r?\\n/g, "\\u21b5\\n").replace(/\\t/g, "\\u21e5\\t");
      var element = make("span", index < text.prompt ? "token" : "token answer", shown);
      element.tabIndex = index ? -1 : 0;
      box.appendChild(element);
    });
    return box;
  }

  function build() {
    texts.textContent = "";
    var last = null;
    data.texts.forEach(function (text) {
      if (task.value && text.task !== task.value) { return; }
      if (text.task !== last) { texts.appendChild(make("h2", "", text.task)); }
      last = text.task;
      var box = listed(text);
      box.source = text;
      texts.appendChild(box);
    });
    colour();
  }

  function colour() {
    var counts = {}, all = 0;
    texts.querySelectorAll(".tokens").forEach(function (box) {
      var routes = unpack(box.source.routes[layer.value], data.shown[layer.value]);
      box.classList.toggle("numbered", numbers.checked);
      Array.prototype.forEach.call(box.children, function (element, index) {
        var own = routes[index] || [];
        element.routes = own;
        element.style.backgroundColor = own.length ? shade(own[0].expert, own[0].share) : "";
        element.dataset.expert = own.length ? (data.experts ? nameOf(own[0].expert) : own[0].expert + 1) : "";
        if (own.length) { counts[own[0].expert] = (counts[own[0].expert] || 0) + 1; all += 1; }
      });
    });
    describe(counts, all);
    tip.hidden = true;
  }

  function describe(counts, all) {
    legend.textContent = "";
    var used = Object.keys(counts).map(Number).sort(function (a, b) { return counts[b] - counts[a] || a - b; });
    used.slice(0, 12).forEach(function (expert) {
      var item = make("li", "", nameOf(expert) + ": " + percent(counts[expert] / all));
      item.style.backgroundColor = shade(expert, 1);
      legend.appendChild(item);
    });
    if (used.length > 12) { legend.appendChild(make("li", "", "and " + (used.length - 12) + " more")); }
    var gates = data.gates[layer.value], unused = gates - used.length;
    if (unused) { legend.appendChild(make("li", "", unused + " of " + gates + " experts come first for no token")); }
  }

  function tell(element) {
    if (!element.routes) { return; }
    var lines = element.routes.map(function (route) { return nameOf(route.expert) + ": " + percent(route.share); });
    tip.textContent = JSON.stringify(element.textContent) + "\\n" + (lines.join("\\n") || "no expert");
    tip.hidden = false;
    var at = element.getBoundingClientRect(), box = tip.getBoundingClientRect();
    var below = at.bottom + 6 + box.height < window.innerHeight;
    tip.style.left = Math.max(4, Math.min(at.left, window.innerWidth - box.width - 4)) + "px";
    tip.style.top = (below ? at.bottom + 6 : Math.max(4, at.top - box.height - 6)) + "px";
  }

  function goTo(element) {
    if (!element) { return; }
    Array.prototype.forEach.call(element.parentNode.children, function (other) { other.tabIndex = -1; });
    element.tabIndex = 0;
    element.focus();
  }

  function neighbour(box, step) {
    do { box = step < 0 ? box.previousElementSibling : box.nextElementSibling; }
    while (box && !box.classList.contains("tokens"));
    return box && box.children[0];
  }

  function step(event) {
    if (event.key === "Escape") { tip.hidden = true; return; }
    var at = event.target;
    if (!at.classList.contains("token") || event.altKey || event.ctrlKey || event.metaKey) { return; }
    var to = {
      ArrowRight: at.nextElementSibling, ArrowLeft: at.previousElementSibling,
      Home: at.parentNode.children[0], End: at.parentNode.lastElementChild,
      ArrowDown: neighbour(at.parentNode, 1), ArrowUp: neighbour(at.parentNode, -1)
    };
    if (event.key in to) { event.preventDefault(); goTo(to[event.key]); }
  }

  function turn(by) {
    layer.selectedIndex = (layer.selectedIndex + by + layers.length) % layers.length;
    colour();
  }

  layers.forEach(function (name) {
    var option = make("option", "", name);
    option.value = name;
    layer.appendChild(option);
  });
  data.texts.map(function (text) { return text.task; }).filter(function (name, index, all) {
    return all.indexOf(name) === index;
  }).forEach(function (name) {
    var option = make("option", "", name);
    option.value = name;
    task.appendChild(option);
  });
  layer.addEventListener("change", colour);
  numbers.addEventListener("change", colour);
  task.addEventListener("change", build);
  byId("back").addEventListener("click", function () { turn(-1); });
  byId("on").addEventListener("click", function () { turn(1); });
  texts.addEventListener("mouseover", function (event) {
    if (event.target.classList.contains("token")) { tell(event.target); } else { tip.hidden = true; }
  });
  texts.addEventListener("mouseleave", function () { tip.hidden = true; });
  texts.addEventListener("focusin", function (event) { tell(event.target); });
  texts.addEventListener("focusout", function () { tip.hidden = true; });
  document.addEventListener("keydown", step);
  build();
}());
"""
