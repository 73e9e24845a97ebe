"use strict";
(() => {
  const { charts, dark } = JSON.parse(document.getElementById("charts").textContent);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 700px), (pointer: coarse)");
  const choice = {};
  const hidden = new Set();

  // Figures are drawn in the light palette; in the dark scheme every colour is looked up in `dark`.
  const themed = (value, key = "") => {
    if (Array.isArray(value)) return value.map((item) => themed(item, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, themed(item, name)]));
    }
    return scheme.matches && typeof value === "string" && /color(scale)?$/.test(key) ? dark[value] ?? value : value;
  };

  const draw = (id) => {
    const { group, views } = charts[id];
    const figure = themed(views[choice[group]] ?? Object.values(views)[0]);
    for (const trace of figure.data) trace.visible = !hidden.has(trace.legendgroup);
    figure.layout.dragmode = narrow.matches ? false : "zoom";
    return Plotly.react(id, figure.data, figure.layout, {
      responsive: true,
      displayModeBar: false,
    });
  };
  const drawAll = () => Promise.all(Object.keys(charts).map(draw));

  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => {
      const { group, choice: view } = button.dataset;
      choice[group] = view;
      for (const other of document.querySelectorAll(`[data-group="${group}"]`)) {
        other.setAttribute("aria-pressed", String(other.dataset.choice === view));
      }
      for (const [id, chart] of Object.entries(charts)) if (chart.group === group) draw(id);
    });
  }

  for (const button of document.querySelectorAll("[data-arm]")) {
    button.addEventListener("click", () => {
      const { arm } = button.dataset;
      if (!hidden.delete(arm)) hidden.add(arm);
      for (const same of document.querySelectorAll(`[data-arm="${arm}"]`)) {
        same.setAttribute("aria-pressed", String(!hidden.has(arm)));
      }
      drawAll();
    });
  }

  scheme.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  drawAll().then(() => document.documentElement.setAttribute("data-drawn", ""));
})();
