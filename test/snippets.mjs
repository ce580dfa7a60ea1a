/** Code in Markdown files as modules: `import(snippetModule('docs/compose.md'))`. */
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const here = dirname(fileURLToPath(import.meta.url));
const FOLDER = join(here, '.snippets'); // does not exist: where the modules seem to lie, so that their imports resolve like a test's

/** The ```ts and ```js blocks of a Markdown text. */
export function snippets(text) {
  return [...text.matchAll(/^```(?:ts|js)\n([\s\S]*?)^```$/gm)].map((match) => match[1]);
}

/** What to import: all blocks of a file as one module, or the block with this index. */
export function snippetModule(file, index) {
  return join(FOLDER, index === undefined ? `${file}.ts` : `${file}@${index}.ts`);
}

/** Vite plugin that serves them. */
export function markdownSnippets() {
  return {
    name: 'markdown-snippets',
    enforce: 'pre',
    resolveId(id) {
      return id.startsWith(FOLDER) ? id : null;
    },
    load(id) {
      if (!id.startsWith(FOLDER)) return null;
      const [, file, , index] = /^(.*\.md)(@(\d+))?\.ts$/.exec(id.slice(FOLDER.length + 1)) ?? [];
      const blocks = snippets(readFileSync(join(here, '..', file), 'utf8'));
      return index === undefined ? blocks.join('\n') : blocks[Number(index)];
    },
  };
}
