// Curves that answer: a crosshair with values, a drag zooms, a double click shows all again, a log axis, smoothing.
// The picture that stands in the page is replaced; without scripts it stays.
"use strict";
(() => {
  const HEIGHT = 260; // pixels
  const MANY = 8; // curves, of which only the one under the pointer is named
  const figures = [...document.querySelectorAll("figure.curves")];
  const sync = uPlot.sync("step");
  let weight = 0; // of the past, from 0 to 0.99

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value) => {
    if (value == null) return "";
    const size = Math.abs(value), short = Number(value.toPrecision(5));
    return size >= 1e7 || (size > 0 && size < 1e-3) ? short.toExponential() : short.toLocaleString("en", { maximumFractionDigits: 10 });
  };

  // An exponential moving average without the pull towards zero at its beginning.
  function smoothed(values) {
    let mean = 0, share = 0;
    return values.map((value) => {
      if (value == null) return null;
      mean = weight * mean + (1 - weight) * value;
      share = weight * share + (1 - weight);
      return mean / share;
    });
  }

  function tables(curves) {
    return uPlot.join(curves.flatMap((curve) => {
      const raw = [[curve.steps, curve.values]];
      return weight > 0 ? [...raw, [curve.steps, smoothed(curve.values)]] : raw;
    }));
  }

  function series(curves) {
    return curves.flatMap((curve) => {
      const points = { show: curve.steps.length < 30, size: 4 };
      const line = { label: curve.label, stroke: curve.colour, width: curve.width, spanGaps: true, points };
      return weight > 0 ? [{ ...line, alpha: 0.25, width: 1, isRaw: true }, line] : [line];
    });
  }

  function draw(figure) {
    const { label, curves } = figure.data;
    const names = curves.length > MANY ? "focus" : "all";
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const options = {
      width: figure.place.clientWidth || 440,
      height: HEIGHT,
      legend: { show: false },
      scales: { x: { time: false }, y: { distr: figure.isLog ? 3 : 1 } },
      cursor: { sync: { key: sync.key, setSeries: false }, focus: { prox: names === "focus" ? 24 : -1 }, drag: { x: true, y: false } },
      focus: { alpha: 0.25 },
      axes: [{ ...axis }, { ...axis, size: 64, values: (_, ticks) => ticks.map(number) }],
      series: [{ label: "step" }, ...series(curves)],
      hooks: { setCursor: [(plot) => tell(figure, plot)], setSeries: [(plot, at) => { figure.focused = at; tell(figure, plot); }] },
    };
    figure.plot?.destroy();
    figure.focused = null;
    figure.plot = new uPlot(options, tables(curves), figure.place);
    figure.plot.over.title = "drag to zoom, double click to see all";
    tell(figure, figure.plot);
  }

  // What is under the pointer; without one, each curve's name and last value.
  function tell(figure, plot) {
    const at = plot.cursor.idx;
    const shown = plot.series.map((line, number) => ({ line, number })).slice(1).filter(({ line }) => !line.isRaw);
    const wanted = shown.length <= MANY ? shown : shown.filter(({ number }) => number === figure.focused);
    const parts = wanted.map(({ line, number: column }) => {
      const values = plot.data[column];
      const value = at == null ? values.findLast((v) => v != null) : values[at];
      const part = document.createElement("i");
      part.style.color = typeof line.stroke === "function" ? line.stroke() : line.stroke;
      part.textContent = value == null ? line.label : `${line.label} ${number(value)}`;
      return part;
    });
    const step = at == null ? "" : `step ${plot.data[0][at]}  `;
    const hint = parts.length === 0 ? `${shown.length} curves; point at one` : "";
    figure.here.replaceChildren(step, ...parts, hint);
  }

  function prepare(figure) {
    figure.data = JSON.parse(figure.querySelector("script").textContent);
    const values = figure.data.curves.flatMap((curve) => curve.values).filter((value) => value != null);
    figure.isLog = figure.data.log && values.every((value) => value > 0);
    figure.place = document.createElement("div");
    figure.here = Object.assign(document.createElement("div"), { className: "here" });
    const header = document.createElement("header");
    header.append(Object.assign(document.createElement("b"), { textContent: figure.data.label }));
    if (values.length && values.every((value) => value > 0)) {
      const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: figure.isLog });
      box.addEventListener("change", () => { figure.isLog = box.checked; draw(figure); });
      const label = document.createElement("label");
      label.append(box, " log");
      header.append(label);
    }
    figure.replaceChildren(header, figure.place, figure.here);
    draw(figure);
    new ResizeObserver(() => {
      const width = figure.place.clientWidth;
      if (width && width !== figure.plot.width) figure.plot.setSize({ width, height: HEIGHT });
    }).observe(figure.place);
  }

  function addSmoothing(first) {
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, id: "smoothing" });
    const label = Object.assign(document.createElement("label"), { htmlFor: "smoothing", textContent: "smoothing" });
    const shown = Object.assign(document.createElement("output"), { textContent: "0" });
    slider.addEventListener("input", () => {
      weight = Number(slider.value);
      shown.textContent = slider.value;
      figures.forEach(draw);
    });
    const bar = Object.assign(document.createElement("div"), { className: "smoothing" });
    bar.append(label, slider, shown, "· drag over a plot to zoom, double click to see all");
    first.closest(".plots").before(bar);
  }

  figures.forEach(prepare);
  if (figures.length) addSmoothing(figures[0]);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(draw));
})();
