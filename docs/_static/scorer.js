// What a search shows first: pages whose title has all words, then sections, then text; source code last.
var Scorer = {
  objNameMatch: 40,
  objPartialMatch: 4,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,

  score: function ([docname, title, anchor, description, score]) {
    const query = new URLSearchParams(window.location.search).get("q") || "";
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const isPage = !anchor && description === null;
    if (isPage && words.every((word) => title.toLowerCase().includes(word))) return score + 100;
    return docname.startsWith("_modules") ? score - 100 : score;
  },
};
