/** Installed packages at work in plain node processes: nothing native at import, addons that find @lc/tensor's table, errors that say what to do. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BuildInfo } from '@lc/tensor';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { execute, packages, plainEnv, readManifest, root, Tarballs } from './install.js';

const addons = packages.filter((name) => name !== 'tensor' && existsSync(join(root, 'packages', name, 'native/binding.gyp')));
let home: string;
let project: string;
beforeAll(() => {
  home = mkdtempSync(join(tmpdir(), 'lc-use-'));
  project = new Tarballs(home).install('user', packages);
});
afterAll(() => rmSync(home, { recursive: true, force: true }));

/** What a script logs, as JSON. */
function inProject<T>(kind: 'module' | 'commonjs', script: string): T {
  return JSON.parse(execute(process.execPath, [`--input-type=${kind}`, '-e', script], project, plainEnv(home))) as T;
}

const LOADED = "process.report.getReport().sharedObjects.filter((file) => file.endsWith('.node')).length";

it('importing everything loads no native code; the first tensor does', () => {
  const names = JSON.stringify(packages.map((name) => `@lc/${name}`));
  const esm = `for (const name of ${names}) await import(name); const { zeros } = await import('@lc/tensor');`;
  const cjs = `for (const name of ${names}) require(name); const { zeros } = require('@lc/tensor');`;
  const tail = `const before = ${LOADED}; zeros([1]).dispose(); console.log(JSON.stringify([before, ${LOADED}]));`;
  expect(inProject('module', esm + tail)).toEqual([0, 1]);
  expect(inProject('commonjs', cjs + tail)).toEqual([0, 1]);
});

it('neither importing everything nor work on the CPU looks for a driver; asking for devices does', () => {
  // The dynamic loader's own log of the libraries that were asked for, found or not.
  const asked = (work: string): string => {
    const names = JSON.stringify(packages.map((name) => `@lc/${name}`));
    const script = `for (const name of ${names}) await import(name); const { devices, zeros } = await import('@lc/tensor'); ${work}`;
    const env = { ...plainEnv(home), LD_DEBUG: 'libs' };
    const { status, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
      cwd: project,
      env,
      encoding: 'utf8',
      maxBuffer: 64 << 20,
    });
    expect(status).toBe(0);
    return [...new Set(stderr.match(/find library=lib(cuda|nvidia|cublas)[^ ]*/g) ?? [])].join();
  };
  expect(asked('zeros([1]).dispose();')).toBe('');
  if (inProject<boolean>('module', `import { buildInfo } from '@lc/tensor'; console.log(buildInfo().cuda);`))
    expect(asked('devices();')).toContain('libcuda');
});

it.each([
  ['ESM', 'module', `import * as tensor from '@lc/tensor'; import * as ce from '@lc/chunked-ce';`],
  ['CommonJS', 'commonjs', `const tensor = require('@lc/tensor'); const ce = require('@lc/chunked-ce');`],
  [
    'tensors of one and an op of the other',
    'module',
    `import * as tensor from '@lc/tensor'; import { createRequire } from 'node:module';
     const ce = createRequire(process.cwd() + '/x.js')('@lc/chunked-ce');`,
  ],
] as const)('an op runs: %s', (_name, kind, head) => {
  const work = `
    const ws = new tensor.Workspace();
    const hidden = tensor.fromTypedArray(Float32Array.of(1, 2, 3, 4), [2, 2]);
    const weight = tensor.fromTypedArray(Float32Array.of(1, 0, 0, 1, 1, 1), [3, 2]);
    const labels = tensor.fromTypedArray(Int32Array.of(2, -100), [2]);
    console.log(JSON.stringify(ce.chunkedCrossEntropy({ hidden, weight, labels, chunk: 1, ws })));`;
  const want = Math.log(Math.exp(1) + Math.exp(2) + Math.exp(3)) - 3;
  const { loss, supervised } = inProject<{ loss: number; supervised: number }>(kind, head + work);
  expect(supervised).toBe(1);
  expect(Math.abs(loss - want)).toBeLessThan(1e-6);
});

it('every addon loads and takes the table', () => {
  const script = `
    import { loadAddon } from '@lc/tensor';
    const from = (name) => process.cwd() + '/node_modules/@lc/' + name + '/dist/index.js';
    const loads = (name) => typeof loadAddon({ packageName: '@lc/' + name, from: from(name) })().init === 'function';
    console.log(JSON.stringify(${JSON.stringify(addons)}.filter(loads)));`;
  expect(inProject('module', script)).toEqual(addons);
});

it('every addon says what it was built from: to JS, and as text in its file', () => {
  const script = `
    import { buildInfo, loadAddon } from '@lc/tensor';
    import { readFileSync } from 'node:fs';
    const dir = (name) => process.cwd() + '/node_modules/@lc/' + name;
    const text = (name) => readFileSync(dir(name) + '/prebuilds/linux-x64/@lc+' + name + '.glibc.node', 'latin1').match(/lc_build_info (\\{[^}]*\\})/)[1];
    const infos = { tensor: buildInfo() };
    for (const name of ${JSON.stringify(addons)}) infos[name] = loadAddon({ packageName: '@lc/' + name, from: dir(name) + '/dist/index.js' })().buildInfo;
    console.log(JSON.stringify(Object.entries(infos).map(([name, info]) => ({ name, info, file: JSON.parse(text(name)) }))));`;
  const all = inProject<{ name: string; info: BuildInfo; file: BuildInfo }[]>('module', script);
  expect(all.map(({ name }) => name).sort()).toEqual(['tensor', ...addons].sort());
  for (const { name, info, file } of all) {
    expect(file).toEqual(info);
    expect(info).toMatchObject({ version: readManifest(join(root, 'packages', name)).version, abi: all[0]?.info.abi, napi: 8 });
    expect(info.compiler).toMatch(/^\w\S* \d+\./);
    expect(typeof info.cudaTargets).toBe(info.cuda ? 'string' : 'undefined');
  }
});

it('a package without its binary, or with one that is none, says what to do', () => {
  const script = `
    const { loadAddon } = require('@lc/tensor');
    const { mkdirSync, writeFileSync } = require('node:fs');
    const dir = process.cwd() + '/node_modules/@lc/none';
    mkdirSync(dir + '/dist', { recursive: true });
    writeFileSync(dir + '/package.json', '{ "name": "@lc/none", "version": "0.0.0" }');
    const attempt = () => {
      try { loadAddon({ packageName: '@lc/none', from: dir + '/dist/index.js' })(); } catch ({ code, message }) { return { code, message }; }
    };
    const without = attempt();
    mkdirSync(dir + '/prebuilds/linux-x64', { recursive: true });
    writeFileSync(dir + '/prebuilds/linux-x64/@lc+none.glibc.node', 'not an addon');
    console.log(JSON.stringify([without, attempt()]));`;
  expect(inProject('commonjs', script)).toEqual([
    {
      code: 'ERR_LC_NO_PREBUILD',
      message: expect.stringMatching(
        /^@lc\/none: no native binary for linux-x64:\n {2}- .*prebuilds is missing: .*\nTo fix it, install the package again \(npm install --force\)/,
      ),
    },
    {
      code: 'ERR_LC_DLOPEN',
      message: expect.stringMatching(
        /^@lc\/none: its native binary did not load:\n {2}- .*is no Linux library: 12 bytes that begin with 'not an addon'\n {2}- the loader said: /,
      ),
    },
  ]);
});
