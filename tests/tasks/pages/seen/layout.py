"""Whether what a page shows can be read: nothing beyond its edge, no text over another, none cut."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page

# Letters stand in the middle of their line: of a box, a sixth above and below is air, in which a neighbour may stand.
_SCRIPT = """
() => {
  const found = [], air = 1 / 6, near = 1;
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push(`the page is ${root.scrollWidth} px wide in a window of ${root.clientWidth} px`);

  const shown = (node) => {
    for (let at = node; at && at.nodeType === 1; at = at.parentNode) {
      const style = getComputedStyle(at);
      if (style.visibility === "hidden" || style.display === "none" || style.opacity === "0") return false;
    }
    return true;
  };
  const quad = (text) => {  // the corners of a text of a picture, turned as it is
    const box = text.getBBox(), to = text.getScreenCTM();
    const low = box.y + air * box.height, high = box.y + (1 - air) * box.height;
    return [[box.x, low], [box.x + box.width, low], [box.x + box.width, high], [box.x, high]].map(([x, y]) => {
      const p = new DOMPoint(x, y).matrixTransform(to);
      return [p.x, p.y];
    });
  };
  const apart = (one, other) => [one, other].some((of) => of.some(([x, y], i) => {  // an axis on which their shadows do not meet
    const [u, v] = of[(i + 1) % of.length], length = Math.hypot(u - x, v - y) || 1, axis = [(y - v) / length, (u - x) / length];
    const shadow = (points) => points.map((p) => p[0] * axis[0] + p[1] * axis[1]);
    const a = shadow(one), b = shadow(other);
    return Math.min(Math.max(...a), Math.max(...b)) - Math.max(Math.min(...a), Math.min(...b)) <= near;
  }));

  for (const chart of document.querySelectorAll(".chart")) {
    const name = chart.getAttribute("aria-label"), svg = chart.querySelector("svg"), frame = svg.getBoundingClientRect();
    if (frame.right > chart.getBoundingClientRect().right + near) found.push(`${name}: the picture is cut at the right`);
    const texts = [];
    for (const text of svg.querySelectorAll("text")) {
      if (!text.textContent.trim() || !shown(text)) continue;
      const corners = quad(text), [xs, ys] = [0, 1].map((i) => corners.map((p) => p[i]));
      if (text.textContent.includes("…")) found.push(`${name}: "${text.textContent}" is shortened`);
      if (Math.min(...xs) < frame.left - near || Math.max(...xs) > frame.right + near || Math.min(...ys) < frame.top - near ||
          Math.max(...ys) > frame.bottom + near) found.push(`${name}: "${text.textContent}" is cut`);
      const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b);
      if (size < 8) found.push(`${name}: the letters of "${text.textContent}" have ${size.toFixed(1)} px`);
      texts.push([text.textContent, corners]);
    }
    texts.forEach(([one, mine], i) => texts.slice(i + 1).forEach(([other, theirs]) => {
      const halo = one === other && mine.every((p, k) => Math.hypot(p[0] - theirs[k][0], p[1] - theirs[k][1]) < near);
      if (!halo && !apart(mine, theirs)) found.push(`${name}: "${one}" stands over "${other}"`);
    }));
  }

  const lines = [], walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("svg, option, script, style") || !shown(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (let {left, right, top, bottom} of range.getClientRects()) {
      let scrolled = false;
      for (let at = parent; at; at = at.parentElement) {  // what a box of its own scrolls does not show
        if (["auto", "scroll"].includes(getComputedStyle(at).overflowX) || ["auto", "scroll"].includes(getComputedStyle(at).overflowY)) {
          const box = at.getBoundingClientRect();
          [left, right, top, bottom] = [Math.max(left, box.left), Math.min(right, box.right), Math.max(top, box.top), Math.min(bottom, box.bottom)];
          scrolled = true;
        }
      }
      if (right - left < near || bottom - top < near) continue;
      if (!scrolled && (left < -near || right > root.clientWidth + near)) found.push(`"${node.textContent.trim()}" stands beyond the edge`);
      const inset = air * (bottom - top);
      lines.push({said: node.textContent.trim(), parent, left, right, top: top + inset, bottom: bottom - inset});
    }
  }
  lines.sort((one, other) => one.top - other.top);
  lines.forEach((one, i) => {
    for (let k = i + 1; k < lines.length && lines[k].top < one.bottom - near; k++) {
      const other = lines[k], stuck = [one, other].some((line) => getComputedStyle(line.parent).position === "sticky");
      if (!stuck && Math.min(one.right, other.right) - Math.max(one.left, other.left) > near) found.push(`"${one.said}" stands over "${other.said}"`);
    }
  });
  for (const element of document.querySelectorAll("main *:not(svg, svg *)")) {
    const style = getComputedStyle(element);
    if (style.overflowX === "hidden" && element.clientWidth && element.scrollWidth > element.clientWidth + near)
      found.push(`<${element.tagName.toLowerCase()} class="${element.className}"> hides what is wider than it`);
  }
  return found;
}
"""


def hard_to_read(page: Page) -> list[str]:
    """What is wrong with the page as it stands in its window; nothing, where all can be read."""
    found: list[Any] = page.evaluate(_SCRIPT)
    return list(dict.fromkeys(map(str, found)))
