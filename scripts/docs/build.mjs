// `npm run docs:build`: API pages by typedoc (an export without documentation is an error), pages from the repository's Markdown, the site by VitePress, and every
// link in it. `--dev` serves it and follows the Markdown; `--external` asks other sites for what is linked to there; `--api` stops after typedoc, `--quiet`
// shows only what is wrong.
import { spawn } from 'node:child_process';
import { rmSync, watch } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { root, run } from '../lib.mjs';
import { checkExternal, checkSite } from './links.mjs';
import { docs, pages, site, writePages } from './pages.mjs';

const { values } = parseArgs({
  options: { dev: { type: 'boolean' }, external: { type: 'boolean' }, api: { type: 'boolean' }, quiet: { type: 'boolean' } },
});
const program = (name) => join(docs, 'node_modules/.bin', name);
const tool = (name, args) => run(program(name), args, { cwd: docs, ...(values.quiet ? { stdio: ['ignore', 'ignore', 'inherit'] } : {}) });
const output = join(docs, '.vitepress/dist');

rmSync(site, { recursive: true, force: true });
tool('typedoc', [
  '--options',
  'typedoc.json',
  ...(values.api ? ['--emit', 'none'] : []),
  ...(values.dev ? [] : ['--treatWarningsAsErrors']),
]);
if (values.api) process.exit();
writePages();

if (values.dev) {
  for (const source of pages.keys()) watch(join(root, source), () => writePages());
  const server = spawn(program('vitepress'), ['dev'], { cwd: docs, stdio: 'inherit' });
  server.on('exit', (code) => process.exit(code ?? 0));
} else {
  rmSync(output, { recursive: true, force: true });
  tool('vitepress', ['build']);
  const { problems, files, links, external } = checkSite(output);
  if (values.external) problems.push(...(await checkExternal(external)));
  for (const problem of problems) console.error(`[lc] ${problem}`);
  console.log(
    `${files} pages, ${links} links between them, ${external.size} to other sites${values.external ? '' : ' (not asked; --external does)'}`,
  );
  process.exit(problems.length > 0 ? 1 : 0);
}
