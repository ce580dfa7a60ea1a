/** Every package's README stands alone: its first code block runs as it stands, and every block type-checks. */
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { describe, expect, it, vi } from 'vitest';
import { snippetModule, snippets } from '../snippets.mjs';

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const packages = readdirSync(join(root, 'packages'));
const blocks = new Map(packages.map((name) => [name, snippets(readFileSync(join(root, 'packages', name, 'README.md'), 'utf8'))]));

const LINES = 20; // a block is read before it is run

describe('the first block runs', () => {
  for (const name of packages) {
    const block = blocks.get(name)?.[0] ?? '';
    it(`@lc/${name}`, async () => {
      const log = vi.spyOn(console, 'log').mockImplementation(() => {});
      try {
        await import(/* @vite-ignore */ snippetModule(`packages/${name}/README.md`, 0));
        for (const value of log.mock.calls.flat()) expect(value).not.toBeNaN();
        expect(log, 'a block shows what came out').toHaveBeenCalled();
      } finally {
        log.mockRestore();
      }
    });
    it(`@lc/${name}: at most ${LINES} lines, from npm packages alone`, () => {
      expect(block.split('\n').filter((line) => line.trim() !== '').length).toBeLessThanOrEqual(LINES);
      const imported = [...block.matchAll(/ from '([^']+)'/g)].map((match) => match[1]);
      expect(imported).toContain(`@lc/${name}`);
      for (const from of imported) expect(from).toMatch(/^(node:\w+|@lc\/[\w-]+)$/);
      expect(block).not.toMatch(/examples\/|\.\.?\//); // no file that only the repository has
    });
  }
});

it.each(packages)(
  'the README of %s stands alone: what a reader looks for, in this order, and no link that only the repository can follow',
  (name) => {
    const text = readFileSync(join(root, 'packages', name, 'README.md'), 'utf8');
    const wanted = ['# ', 'The problem:', '## What it saves', '## Use', '## API', '## How it fails', '## How it composes'];
    const found = wanted.map((heading) => text.search(new RegExp(`^${heading}`, 'm')));
    expect(found).not.toContain(-1);
    expect(found).toEqual([...found].sort((a, b) => a - b));
    expect([...text.matchAll(/\]\(([^)]*)\)/g)].map((match) => match[1]).filter((href) => !/^(https:|#)/.test(href ?? ''))).toEqual([]);
  },
);

it('blocks and docs/compose.md type-check', () => {
  const files = new Map<string, string>();
  // Beside the tests, so that imports resolve as theirs do.
  const place = (name: string, text: string): unknown => files.set(join(root, 'test', `readme-${name}.ts`), text);
  for (const name of packages) {
    const typed = [...readFileSync(join(root, 'packages', name, 'README.md'), 'utf8').matchAll(/^```ts\n([\s\S]*?)^```$/gm)];
    for (const [i, block] of typed.entries()) place(`${name}-${i}`, `${block[1]}\nexport {};`);
  }
  place('compose', snippets(readFileSync(join(root, 'docs/compose.md'), 'utf8')).join('\n'));

  const { config } = ts.readConfigFile(join(root, 'tsconfig.base.json'), ts.sys.readFile);
  const { options } = ts.parseJsonConfigFileContent({ ...config, files: [] }, ts.sys, join(root, 'test'));
  options.noUnusedLocals = false; // a block may show what it does not use
  const host = ts.createCompilerHost(options);
  const { fileExists, getSourceFile, readFile } = host;
  host.fileExists = (file) => files.has(file) || fileExists(file);
  host.readFile = (file) => files.get(file) ?? readFile(file);
  host.getSourceFile = (file, target, ...rest) => {
    const text = files.get(file);
    return text === undefined ? getSourceFile(file, target, ...rest) : ts.createSourceFile(file, text, target);
  };
  const program = ts.createProgram([...files.keys()], options, host);
  const problems = [...files.keys()].flatMap((file) => {
    const source = program.getSourceFile(file);
    return [...program.getSyntacticDiagnostics(source), ...program.getSemanticDiagnostics(source)].map((d) => {
      const line = source && d.start !== undefined ? source.getLineAndCharacterOfPosition(d.start).line + 1 : 0;
      return `${file.slice(root.length + 1)}:${line} ${ts.flattenDiagnosticMessageText(d.messageText, ' ')}`;
    });
  });
  expect(problems).toEqual([]);
});
