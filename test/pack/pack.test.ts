/** What a user gets: tarballs that install without a compiler, import from ESM, CommonJS and TypeScript, and run. */
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { TARBALL_LIMIT } from '../../scripts/release/addon.mjs';
import { execute, packages, plainEnv, readManifest, root, Tarballs } from './install.js';

const native = packages.filter((name) => existsSync(join(root, 'packages', name, 'native/binding.gyp')));
const unbuilt = packages.filter((name) => !existsSync(join(root, 'packages', name, 'dist/index.js')));
if (unbuilt.length > 0) throw new Error(`not built: ${unbuilt.join(', ')}; npm run setup first`);

let home: string;
let tarballs: Tarballs;
let all: string;
beforeAll(() => {
  home = mkdtempSync(join(tmpdir(), 'lc-pack-'));
  tarballs = new Tarballs(home);
  all = tarballs.install('all', packages);
});
afterAll(() => rmSync(home, { recursive: true, force: true }));

const entries = packages.flatMap((name) =>
  Object.keys(readManifest(join(root, 'packages', name)).exports ?? {})
    .filter((path) => path !== './testing') // needs vitest
    .map((path) => join('@lc', name, path)),
);
const node = (dir: string, file: string, code: string): string => {
  writeFileSync(join(dir, file), code);
  return execute(process.execPath, [file], dir, plainEnv(home));
};

describe.each(packages)('the tarball of %s', (name) => {
  const dir = () => join(all, 'node_modules/@lc', name);
  it('is not larger than a release may be', () => {
    expect(statSync(tarballs.files.get(`@lc/${name}`) as string).size).toBeLessThanOrEqual(TARBALL_LIMIT);
  });
  it('holds what runs, and nothing that a package manager would build or run', () => {
    const expected = ['LICENSE', 'README.md', 'dist', 'package.json', ...(native.includes(name) ? ['prebuilds'] : [])];
    expect(readdirSync(dir()).sort()).toEqual(expected.sort());
    expect(existsSync(join(dir(), 'binding.gyp'))).toBe(false);
    const manifest = readManifest(dir());
    for (const script of ['preinstall', 'install', 'postinstall', 'prepare']) expect(manifest.scripts ?? {}).not.toHaveProperty(script);
  });
  it('names no source, and no other package by its place in the workspace', () => {
    const manifest = readManifest(dir());
    expect(JSON.stringify(manifest.exports)).not.toMatch(/lc-source|\/src\//);
    expect(JSON.stringify([manifest.dependencies, manifest.peerDependencies])).not.toContain('workspace:');
    if (name !== 'tensor') expect(manifest.peerDependencies).toHaveProperty('@lc/tensor');
    for (const target of JSON.stringify(manifest.exports).match(/\.\/[^"]+\.(c?js|d\.c?ts)/g) ?? []) {
      expect(existsSync(join(dir(), target)), target).toBe(true);
    }
  });
});

describe('installed', () => {
  it('ESM and CommonJS export the same names', () => {
    const listing = (load: string) =>
      `for (const name of ${JSON.stringify(entries)}) console.log(name, Object.keys(${load}).filter((k) => k !== 'default').sort().join());`;
    const esm = node(all, 'list.mjs', listing('await import(name)'));
    expect(node(all, 'list.cjs', listing('require(name)'))).toBe(esm);
    for (const line of esm.trim().split('\n')) expect(line).toMatch(/^@lc\/\S+ \w+/);
  });

  it('types resolve under nodenext, from ESM and CommonJS', () => {
    const body = entries.map((name, i) => `import * as m${i} from '${name}';`).join('\n');
    const uses = `export const all: object[] = [${entries.map((_, i) => `m${i}`).join(', ')}];\n`;
    writeFileSync(join(all, 'types.mts'), `${body}\n${uses}`);
    writeFileSync(join(all, 'types.cts'), `${body}\n${uses}`);
    const compilerOptions = {
      target: 'ES2022',
      lib: ['ES2023', 'ESNext.Disposable'],
      module: 'NodeNext',
      strict: true,
      skipLibCheck: false,
      noEmit: true,
      types: ['node'],
      typeRoots: [join(root, 'node_modules/@types')],
    };
    writeFileSync(join(all, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: ['types.mts', 'types.cts'] }));
    execute(process.execPath, [join(root, 'node_modules/typescript/bin/tsc'), '-p', '.'], all);
  });

  it.each(packages.flatMap((name) => Object.keys(readManifest(join(root, 'packages', name)).bin ?? {})))(
    'the %s command starts',
    (command) => {
      const help = command === 'lc' ? ['--help'] : [];
      expect(execute(join(all, 'node_modules/.bin', command), help, all, plainEnv(home)).length).toBeGreaterThan(0);
    },
  );

  it('handles of the ESM and the CommonJS copy are the same thing', () => {
    const code = `
      import { createRequire } from 'node:module';
      import { fromTypedArray, gemm } from '@lc/tensor';
      const cjs = createRequire(import.meta.url)('@lc/tensor');
      const a = fromTypedArray(Float32Array.of(1, 2, 3, 4), [2, 2]);
      const c = cjs.zeros([2, 2]);
      gemm({ a, b: cjs.fromTypedArray(Float32Array.of(0, 1, 1, 0), [2, 2]), c });
      console.log([...c.data()].join());`;
    expect(node(all, 'mixed.mjs', code).trim()).toBe('2,1,4,3');
  });
});

describe.each(['attention', 'chunked-ce', 'tiled-mlp', 'offload-ckpt', 'qlora'])('%s alone', (name) => {
  let dir: string;
  beforeAll(() => {
    dir = tarballs.install(`only-${name}`, [name]);
  });
  it('installs with @lc/tensor only', () => {
    expect(readdirSync(join(dir, 'node_modules/@lc')).sort()).toEqual([name, 'tensor'].sort());
    expect(node(dir, 'import.mjs', `console.log(Object.keys(await import('@lc/${name}')).length > 0);`).trim()).toBe('true');
  });
});
