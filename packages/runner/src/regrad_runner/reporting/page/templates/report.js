// Sorts tables, hides lines and reads values off. Without it the page is complete.
"use strict";

function sortable(table) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) return;
  headings.forEach((heading, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = heading.classList.contains("number");
      const compare = (one, other) => {
        const [a, b] = [one, other].map((row) => row.cells[place].dataset.key);
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

function switchable(item) {
  const section = item.closest("section");
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-pressed", "true");
  button.append(...item.childNodes);
  item.append(button);
  button.addEventListener("click", () => {
    const hides = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!hides));
    for (const mark of section.querySelectorAll(`svg [data-series="${item.dataset.series}"]`)) {
      mark.classList.toggle("off", hides);
    }
  });
}

function readable(box) {
  const canvas = box.querySelector(".canvas");
  const lines = [...box.querySelectorAll(".points")].map((mark) => ({
    mark, name: mark.dataset.name, points: JSON.parse(mark.dataset.points),
  }));
  const places = [...new Set(lines.flatMap((line) => line.points.map((point) => point[1])))].sort((a, b) => a - b);
  if (!places.length) return;
  const guide = document.createElementNS("http://www.w3.org/2000/svg", "line");
  guide.setAttribute("class", "guide off");
  guide.setAttribute("y1", "0");
  guide.setAttribute("y2", "100%");
  canvas.append(guide);
  const readout = document.createElement("output");
  readout.className = "readout";
  const scrubber = document.createElement("input");
  Object.assign(scrubber, { type: "range", className: "scrubber", min: 0, max: places.length - 1, value: 0 });
  scrubber.setAttribute("aria-label", `Read values off along ${box.dataset.unit}`);
  box.append(readout, scrubber);

  function show(index) {
    const place = places[index];
    const seen = lines.filter((line) => !line.mark.classList.contains("off")).flatMap((line) => {
      const nearest = line.points.reduce((best, point) =>
        Math.abs(point[1] - place) < Math.abs(best[1] - place) ? point : best);
      return Math.abs(nearest[1] - place) > 0.02 ? [] : [[line.name, nearest]];
    });
    if (!seen.length) return hide();
    const heading = `${seen[0][1][0].toLocaleString("en-GB")} ${box.dataset.unit}`;
    const rows = seen.sort((a, b) => a[1][2] - b[1][2]).map(([name, point]) => `${point[3].toPrecision(4)}  ${name}`);
    readout.textContent = [heading, ...rows].join("\n");
    guide.setAttribute("x1", `${100 * place}%`);
    guide.setAttribute("x2", `${100 * place}%`);
    guide.classList.remove("off");
    const left = canvas.getBoundingClientRect().left - box.getBoundingClientRect().left;
    const at = left + place * canvas.getBoundingClientRect().width;
    const room = box.clientWidth - readout.offsetWidth;
    readout.style.left = `${Math.max(0, Math.min(room, at > box.clientWidth / 2 ? at - readout.offsetWidth - 12 : at + 12))}px`;
    scrubber.value = index;
    scrubber.setAttribute("aria-valuetext", readout.textContent.replaceAll("\n", ", "));
  }

  function hide() {
    readout.textContent = "";
    guide.classList.add("off");
  }

  box.addEventListener("pointermove", (event) => {
    const { left, width } = canvas.getBoundingClientRect();
    const wanted = (event.clientX - left) / width;
    const distances = places.map((place) => Math.abs(place - wanted));
    show(distances.indexOf(Math.min(...distances)));
  });
  box.addEventListener("pointerleave", hide);
  scrubber.addEventListener("input", () => show(Number(scrubber.value)));
  scrubber.addEventListener("focus", () => scrubber.matches(":focus-visible") && show(Number(scrubber.value)));
  scrubber.addEventListener("blur", hide);
}

function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const details = target?.querySelector(":scope > details");
  if (details && target.classList.contains("folded")) details.open = true;
}

document.querySelectorAll("table").forEach(sortable);
document.querySelectorAll(".legend li").forEach(switchable);
document.querySelectorAll(".curves").forEach(readable);
addEventListener("hashchange", unfold);
unfold();
// Paper cannot be unfolded.
const folded = [];
addEventListener("beforeprint", () => {
  folded.push(...document.querySelectorAll("details:not([open])"));
  folded.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => {
  folded.splice(0).forEach((details) => { details.open = false; });
});
