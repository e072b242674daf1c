(() => {
  "use strict";
  const page = document.querySelector(".hfi");
  const all = (selector, from = page) => [...from.querySelectorAll(selector)];
  const queries = all(".query");
  all(".controls").forEach((controls) => { controls.hidden = false; });

  // Search and filter: a query stays if its text, or that of its rows, has all words.
  const search = page.querySelector(".search"), filter = page.querySelector(".filter"), count = page.querySelector(".count");
  const texts = new Map();
  const text = (query) => {
    if (!texts.has(query)) texts.set(query, query.textContent.toLowerCase());
    return texts.get(query);
  };
  const choose = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), levels = filter.value.split(" ");
    let shown = 0;
    for (const query of queries) {
      const fits = (!filter.value || levels.includes(query.dataset.level)) && words.every((word) => text(query).includes(word));
      query.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${queries.length}`;
  };
  if (search) {
    search.addEventListener("input", choose);
    filter.addEventListener("change", choose);
    const fold = (open) => queries.forEach((query) => { if (!query.hidden) query.firstElementChild.open = open; });
    page.querySelector(".open").addEventListener("click", () => fold(true));
    page.querySelector(".close").addEventListener("click", () => fold(false));
  }

  // A link to a query opens it.
  const arrive = () => {
    const target = /^#q\d+$/.test(location.hash) && document.querySelector(location.hash);
    if (!target) return;
    target.closest("details").open = true;
    target.closest(".query").scrollIntoView();
  };
  addEventListener("hashchange", arrive);
  arrive();

  // "/" searches; "j" and "k" go to the next and the previous query.
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    if (event.key === "/" && search) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "j" || event.key === "k") {
      const heads = queries.filter((query) => !query.hidden).map((query) => query.querySelector("summary"));
      const next = heads[Math.min(heads.length - 1, Math.max(0, heads.indexOf(document.activeElement) + (event.key === "j" ? 1 : -1)))];
      if (next) next.focus();
    }
  });

  const cell = (value) => {
    const guarded = /^[=+@\t\r-]/.test(value) && isNaN(value) ? `'${value}` : value; // no spreadsheet runs it
    return `"${guarded.replaceAll('"', '""')}"`;
  };
  const table = (query) => {
    const lists = all(".by", query).filter((list) => list.offsetParent !== null);
    const rows = lists.flatMap((list) => all("[data-row]", list)).map((row) => {
      const own = (name) => row.querySelector(name)?.textContent.trim() ?? "";
      const said = row.matches(".copy") ? all(".text", row) : all(":scope > .text, :scope > .turn > .text", row);
      return [query.dataset.query, own(".rank"), own(".score"), row.dataset.level, row.dataset.row, said.map((one) => one.textContent.trim()).join("\n")];
    });
    rows.sort((one, other) => one[1] - other[1]);
    return [["query", "rank", "score", "level", "row", "text"], ...rows].map((row) => row.map(cell).join(",")).join("\r\n");
  };
  page.addEventListener("click", async (event) => {
    const query = event.target.closest(".query");
    if (event.target.matches(".download")) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([table(query)], { type: "text/csv" }));
      link.download = `query-${query.dataset.query}.csv`;
      link.click();
      URL.revokeObjectURL(link.href);
    } else if (event.target.matches(".link")) {
      const address = `${location.href.split("#")[0]}#q${query.dataset.query}`;
      try {
        await navigator.clipboard.writeText(address);
        event.target.textContent = "Copied";
      } catch {
        location.hash = `q${query.dataset.query}`; // the address bar has it then
        event.target.textContent = "The address bar has the link";
      }
    }
  });
})();
