/** The first code block of every package's README runs as it stands, and every block type-checks. */
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { describe, expect, it, vi } from 'vitest';
import { snippetModule, snippets } from '../snippets.mjs';

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const packages = readdirSync(join(root, 'packages'));
const blocks = new Map(packages.map((name) => [name, snippets(readFileSync(join(root, 'packages', name, 'README.md'), 'utf8'))]));

/** Blocks that do not run by themselves, and why. They are type-checked all the same. */
const NOT_RUN: Record<string, string> = JSON.parse(readFileSync(join(root, 'test/readme/not-run.json'), 'utf8'));

/** What a block says it takes from the user. */
const GIVEN: Record<string, string> = {
  'offload-ckpt': `
    import { embeddingGather, type Layer, type Tensor } from '@lc/tensor';
    declare const layers: Layer[]; declare const docStart: Tensor; declare const step: number; declare const table: Tensor; declare const ids: Tensor;`,
};

describe('the first block runs', () => {
  for (const name of packages) {
    const block = blocks.get(name)?.[0];
    if (!(name in NOT_RUN))
      it(`@lc/${name}`, async () => {
        expect(block, 'a README shows how to use the package').toBeDefined();
        const log = vi.spyOn(console, 'log').mockImplementation(() => {});
        try {
          await import(/* @vite-ignore */ snippetModule(`packages/${name}/README.md`, 0));
          for (const value of log.mock.calls.flat()) expect(value).not.toBeNaN();
        } finally {
          log.mockRestore();
        }
      });
  }
});

it('blocks and docs/compose.md type-check', () => {
  const files = new Map<string, string>();
  // Beside the tests, so that imports resolve as theirs do.
  const place = (name: string, text: string): unknown => files.set(join(root, 'test', `readme-${name}.ts`), text);
  for (const [name, all] of blocks) {
    const text = readFileSync(join(root, 'packages', name, 'README.md'), 'utf8');
    if (all[0] !== undefined && /^```ts$/m.test(text)) place(name, `${GIVEN[name] ?? ''}\n${all[0]}\nexport {};`);
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
