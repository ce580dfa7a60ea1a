/** The site over docs/.site, which scripts/docs/pages.mjs and typedoc write. */
import { defineConfig, type MarkdownRenderer as MarkdownIt } from 'vitepress';
import { apiSidebar, examples, packages } from '../../scripts/docs/pages.mjs';

const group = (text: string, folder: string, names: readonly string[], label = (name: string) => name) => ({
  text,
  collapsed: false,
  items: names.map((name) => ({ text: label(name), link: `/${folder}/${name}` })),
});

export default defineConfig({
  title: 'lc',
  description: 'Fine-tuning of language models on long sequences, from TypeScript',
  srcDir: '.site',
  outDir: '.vitepress/dist',
  cacheDir: '.vitepress/cache',
  cleanUrls: false,
  lastUpdated: false,
  // Pages are Markdown of the repository: <name> and {{ }} in them are text.
  markdown: { html: false, attrs: { disable: true }, config: (md) => md.use(literalBraces).use(anchors) },
  vite: { build: { chunkSizeWarningLimit: 4096, reportCompressedSize: false } }, // the search index is one file
  themeConfig: {
    search: { provider: 'local' },
    outline: { level: [2, 3] },
    nav: [
      { text: 'Start', link: '/' },
      { text: 'Packages', link: '/packages/tensor' },
      { text: 'API', link: '/api/' },
      { text: 'Measurements', link: '/measurements' },
    ],
    sidebar: [
      {
        text: 'lc',
        items: [
          { text: 'Start', link: '/' },
          { text: 'Compose', link: '/compose' },
          { text: 'Architecture', link: '/architecture' },
          { text: 'Measurements', link: '/measurements' },
          { text: 'Contributing', link: '/contributing' },
        ],
      },
      group('Packages', 'packages', packages, (name) => `@lc/${name}`),
      { ...group('Examples', 'examples', examples), link: '/examples/' },
      { text: 'API', collapsed: true, items: apiSidebar() },
    ],
  },
});

/** Vue would evaluate {{ }} in text; as an entity it stays what was written. */
function literalBraces(md: MarkdownIt): void {
  md.renderer.rules.text = (tokens, at) => md.utils.escapeHtml(tokens[at]?.content ?? '').replaceAll('{{', '&#123;&#123;');
}

/** typedoc's anchors are the one kind of HTML that is meant: <a id="x"></a>. */
function anchors(md: MarkdownIt): void {
  md.inline.ruler.before('text', 'anchor', (state, silent) => {
    const [all, id] = /^<a id="([\w-]+)"><\/a>/.exec(state.src.slice(state.pos)) ?? [];
    if (!all) return false;
    if (!silent) state.push('anchor', 'a', 0).meta = id;
    state.pos += all.length;
    return true;
  });
  md.renderer.rules.anchor = (tokens, at) => `<a id="${tokens[at]?.meta}"></a>`;
}
