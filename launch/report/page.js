"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const divs = [...document.querySelectorAll("[data-figure]")];
  const boxes = [...document.querySelectorAll("input[data-run]")];
  const layers = document.getElementById("layers");
  // plotly's button that uploads a figure has no place here; the page's policy would not let it anyway.
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d"],
  };

  const chosen = () => new Set(boxes.filter((box) => box.checked).map((box) => Number(box.dataset.run)));

  function visible(trace, runs) {
    const { run, layer } = trace.meta;
    if (run !== null && !runs.has(run)) return false;
    return layer === null || !layers || layers.value === "both" || layers.value === layer;
  }

  function update() {
    const runs = chosen();
    for (const div of divs) {
      Plotly.restyle(div, { visible: div.data.map((trace) => visible(trace, runs)) });
    }
    for (const row of document.querySelectorAll("[data-row-run]")) {
      row.hidden = !runs.has(Number(row.dataset.rowRun));
    }
  }

  const runs = chosen();
  for (const div of divs) {
    const { data, layout } = figures[div.dataset.figure];
    for (const trace of data) trace.visible = visible(trace, runs);
    Plotly.newPlot(div, data, layout, config);
  }

  for (const box of boxes) box.addEventListener("change", update);
  if (layers) layers.addEventListener("change", update);

  const filter = document.getElementById("filter");
  const listed = (box) => !box.closest("li").hidden;
  if (filter) {
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      for (const box of boxes) {
        const item = box.closest("li");
        item.hidden = !item.textContent.toLowerCase().includes(wanted);
      }
    });
    for (const [id, state] of [["all", true], ["none", false]]) {
      document.getElementById(id).addEventListener("click", () => {
        for (const box of boxes.filter(listed)) box.checked = state;
        update();
      });
    }
  }
})();
