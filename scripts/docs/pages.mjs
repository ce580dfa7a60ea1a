// Which Markdown files of the repository are pages of the site, and their text with links that lead to pages.
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, posix } from 'node:path';
import { manifest, root } from '../lib.mjs';
import { repositoryUrl } from '../release/repository.mjs';

export const docs = join(root, 'docs');
export const site = join(docs, '.site');
const foldersWithReadme = (folder) => readdirSync(join(root, folder)).filter((name) => existsSync(join(root, folder, name, 'README.md')));
export const packages = foldersWithReadme('packages');
export const examples = foldersWithReadme('examples');
const labs = packages.flatMap((name) => {
  const folder = join(root, 'packages', name, 'native');
  return existsSync(folder)
    ? readdirSync(folder)
        .filter((file) => /^LAB.*\.md$/.test(file))
        .map((file) => [name, file])
    : [];
});

/** Page by source, both relative: to the repository and to the site. */
export const pages = new Map([
  ['README.md', 'index.md'],
  ['CONTRIBUTING.md', 'contributing.md'],
  ...readdirSync(docs)
    .filter((file) => file.endsWith('.md'))
    .map((file) => [`docs/${file}`, file]),
  ['examples/README.md', 'examples/index.md'],
  ...packages.map((name) => [`packages/${name}/README.md`, `packages/${name}.md`]),
  ...examples.map((name) => [`examples/${name}/README.md`, `examples/${name}.md`]),
  ...labs.map(([name, file]) => [`packages/${name}/native/${file}`, `lab/${name}-${file.toLowerCase()}`]),
  ['test/gpu/README.md', 'gpu-tests.md'],
]);

const repository = repositoryUrl(manifest);

// Code comes first: what looks like a link in it is none. A link's label may have code in it.
const CODE_OR_LINK = /^```[^\n]*\n[\s\S]*?^```$|^(?: {4}[^\n]*\n)+|(?<!!)\[((?:[^[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)|`[^`\n]+`/gm;

/** A page's text. What a link leads to is a page, else a file where the repository can be read, else just its text. */
export function pageText(source) {
  return readFileSync(join(root, source), 'utf8').replace(CODE_OR_LINK, (whole, label, href) => {
    if (href === undefined || /^[a-z]+:|^#/i.test(href)) return whole;
    const [path, anchor] = href.split('#');
    const target = posix.join(posix.dirname(source), path).replace(/\/$/, '');
    const page = pages.get(target) ?? pages.get(`${target}/README.md`);
    if (page) return `[${label}](/${page}${anchor ? `#${anchor}` : ''})`;
    if (!existsSync(join(root, target))) throw new Error(`${source}: a link leads to ${href}, which is not there`);
    return repository ? `[${label}](${repository}/tree/main/${target})` : label;
  });
}

/** Writes all pages; the API's come from typedoc. */
export function writePages() {
  for (const [source, page] of pages) {
    const file = join(site, page);
    const text = pageText(source);
    if (existsSync(file) && readFileSync(file, 'utf8') === text) continue; // nothing for a dev server to reload
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, text);
  }
}

/** typedoc's pages by the name to import; a namespace after its package. */
export function apiSidebar() {
  const api = join(site, 'api');
  if (!existsSync(api)) return [];
  return readdirSync(api, { recursive: true })
    .filter((file) => file.endsWith('.md') && file !== 'index.md')
    .map((file) => file.replace(/(\/index)?\.md$/, (_, index) => (index ? '/' : '')))
    .map((page) => ({ text: page.replace('/namespaces/', ': ').replace(/\/$/, ''), link: `/api/${page}` }))
    .sort((a, b) => (a.text < b.text ? -1 : 1));
}
