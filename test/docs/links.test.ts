/** The check of the docs site finds what is dead, and takes what is there. The site itself is built by `npm run docs:build`, which `npm test` runs. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { checkSite } from '../../scripts/docs/links.mjs';
import { pages, pageText } from '../../scripts/docs/pages.mjs';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'lc-site-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));
const write = (file: string, html: string): void => {
  mkdirSync(dirname(join(folder, file)), { recursive: true });
  writeFileSync(join(folder, file), html);
};

it('pages, folders, files and anchors that are there', () => {
  write(
    'index.html',
    '<h2 id="a-b">x</h2> <a href="#a-b">1</a> <a href="/api/">2</a> <a href="api/x.html#y">3</a> <a href="/api/x">4</a> <img src="/x.svg">',
  );
  write('api/index.html', '<a href="../#a-b">5</a> <a href="./x.html#%79">6</a> <a href="https://host.example/x?a=1&amp;b=2">7</a>');
  write('api/x.html', '<a id="y"></a>');
  write('x.svg', '');
  expect(checkSite(folder)).toEqual({
    problems: [],
    files: 3,
    links: 7,
    external: new Map([['https://host.example/x?a=1&b=2', 'api/index.html']]),
  });
});

it('pages and anchors that are not', () => {
  write(
    'index.html',
    '<a href="/api/">no index</a> <a href="api/x.html#z">no such anchor</a> <a href="#top">none here</a> <a href="api/y.html">no page</a>',
  );
  write('api/x.html', '<a id="y"></a>');
  expect(checkSite(folder).problems).toEqual([
    'index.html: no page /api/',
    'index.html: no anchor api/x.html#z',
    'index.html: no anchor #top',
    'index.html: no page api/y.html',
  ]);
});

it('links of the repository lead to pages of the site, also with code in their labels; code is left as it is', () => {
  expect(pageText('README.md')).toContain('[`@lc/attention`](/packages/attention.md)');
  expect(pageText('README.md')).toContain('[docs/architecture.md](/architecture.md)');
  expect(pageText('docs/compose.md')).toContain("label: 'weights' });");
  for (const page of pages.values()) expect(page).toMatch(/^[a-z0-9/-]+\.md$/);
});
