"use strict";
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const drawn = new Map(); // element -> uPlot
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // As Python's format() writes it: .1% is a share, and tiny or huge numbers keep their first digits.
  function written(value, spec) {
    if (value == null) return "";
    if (spec.endsWith("%")) return (100 * value).toFixed(+spec[1]) + " %";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
    return spec.endsWith("f") && size >= 1 ? value.toFixed(+spec[1]) : String(+value.toPrecision(4));
  }

  function options(chart, width, caption) {
    const percent = chart.spec.endsWith("%");
    const axis = { stroke: color("--soft"), font: "11px system-ui, sans-serif", ticks: { show: false },
                   grid: { stroke: color("--grid"), width: 1 } };
    // One way of writing for all ticks of an axis: 1e-3 next to 5e-4, not 0.001.
    const ticks = values => values.some(v => v && Math.abs(v) < 1e-3) && !percent
      ? values.map(v => v ? (+v.toPrecision(6)).toExponential() : "0")
      : values.map(v => percent ? +(100 * v).toPrecision(6) + " %" : short(v));
    const last = caption.querySelector(".last") || caption.appendChild(Object.assign(document.createElement("span"), { className: "last" }));
    const still = last.textContent;
    return {
      width, height: 170, padding: [8, 16, 0, 0], legend: { show: false },
      scales: { x: { time: false }, y: percent ? { range: (_, low, high) => shares(low, high) } : {} },
      cursor: { y: false, drag: { x: true, y: false }, points: { size: 6 } },
      axes: [{ ...axis, size: 24, space: 60, values: (_, v) => v.map(short) },
             { ...axis, size: 52, space: 32, values: (_, v) => ticks(v) }],
      series: [{}, ...runs.map((run, place) => (
        { label: run, stroke: color("--run" + place % 6), width: 1.5, spanGaps: false, points: { show: false },
          dash: place >= 6 ? [6, 4] : undefined }))],
      hooks: { setCursor: [plot => {
        const at = plot.cursor.idx;
        if (at == null || plot.cursor.left < 0) { last.textContent = still; return; }
        const near = runs.map((_, place) => nearest(plot.data[place + 1], at)).map(v => written(v, chart.spec));
        last.textContent = near.filter(Boolean).join(" · ") + " at " + plot.data[0][at];
      }] },
    };
  }

  // A share's axis never leaves 0 to 100 %.
  function shares(low, high) {
    if (low == null) return [0, 1];
    const room = (high - low) * 0.1 || 0.05;
    return [Math.max(0, low - room), Math.min(1, high + room) || room];
  }

  // Runs have other updates than each other: the value of a run nearest to where the pointer is.
  function nearest(values, at) {
    for (let far = 0; far < values.length; far++) {
      if (values[at - far] != null) return values[at - far];
      if (values[at + far] != null) return values[at + far];
    }
    return null;
  }

  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
    return size && size < 1e-3 ? value.toExponential(1).replace("e+", "e") : String(+value.toPrecision(6));
  }

  function draw(plot) {
    const chart = charts[plot.dataset.chart], width = Math.floor(plot.clientWidth);
    if (!width) return; // in a part that is folded away
    const old = drawn.get(plot);
    if (old) { if (old.width !== width) old.setSize({ width, height: 170 }); return; }
    const tables = chart.tables;
    const data = tables.length > 1 ? uPlot.join(tables.map(t => t[0].length ? t : [[], []])) : tables[0];
    drawn.set(plot, new uPlot(options(chart, width, plot.parentElement.querySelector("figcaption")), data, plot));
  }

  const plots = document.querySelectorAll(".plot");
  const observer = new ResizeObserver(entries => entries.forEach(entry => draw(entry.target)));
  plots.forEach(plot => { draw(plot); observer.observe(plot); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(plot => {
    const old = drawn.get(plot);
    if (old) { old.destroy(); drawn.delete(plot); draw(plot); }
  }));

  // A page of a running job that nobody has renewed for long: its launcher may be gone.
  for (const stale of document.querySelectorAll(".stale")) {
    const minutes = (Date.now() / 1000 - stale.dataset.made) / 60;
    if (stale.dataset.state === "running" && minutes > 15) {
      stale.textContent = "This page is " + (minutes < 120 ? Math.round(minutes) + " minutes" : Math.round(minutes / 60) + " hours") +
        " old. If it is not renewed, the job no longer runs here: make it again by rlhf-train report, or for a box by fab report.";
      stale.hidden = false;
    }
  }
})();
