/** What turbo rebuilds of the native code, seen by the hashes of `build:native` in a copy of the repository. */
import { spawnSync } from 'node:child_process';
import { appendFileSync, cpSync, existsSync, mkdtempSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const nativePackages = readdirSync(join(root, 'packages')).filter((name) => existsSync(join(root, 'packages', name, 'native/binding.gyp')));
const HEADER = 'native/include/lctx/abi.h';
const SKIP = new Set(['node_modules', 'dist', 'prebuilds', 'build', '.turbo', 'fixtures', 'bench']);
let copy: string;

beforeAll(() => {
  copy = mkdtempSync(join(tmpdir(), 'lc-turbo-'));
  const filter = (source: string): boolean => !SKIP.has(basename(source));
  for (const entry of readdirSync(root, { withFileTypes: true })) {
    const wanted = entry.isFile() || entry.name === 'native' || entry.name === 'packages' || entry.name === 'test';
    if (wanted) cpSync(join(root, entry.name), join(copy, entry.name), { recursive: true, filter });
  }
  symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'));
  writeFileSync(join(copy, '.toolchain'), 'g++ 12\ncpu only\n');
});
afterAll(() => rmSync(copy, { recursive: true, force: true }));

/** Hash by package of those that build something. */
function hashes(task = 'build:native', extra: Record<string, string> = {}): Record<string, string> {
  const bin = join(root, 'node_modules/.bin');
  const env: NodeJS.ProcessEnv = { ...process.env, PATH: `${bin}:${process.env.PATH}`, TURBO_TELEMETRY_DISABLED: '1', DO_NOT_TRACK: '1' };
  for (const name of ['LCTX_CUDA', 'LCTX_CUDA_ARCHS', 'CXX', 'CXXFLAGS']) delete env[name];
  const { stdout, stderr, status } = spawnSync(join(bin, 'turbo'), ['run', task, '--dry=json', '--no-update-notifier'], {
    cwd: copy,
    encoding: 'utf8',
    env: { ...env, ...extra },
    maxBuffer: 1 << 26,
  });
  if (status !== 0) throw new Error(stderr);
  const { tasks } = JSON.parse(stdout) as { tasks: { task: string; package: string; hash: string; command: string }[] };
  const built = tasks.filter((t) => t.task === task && t.command !== '<NONEXISTENT>');
  return Object.fromEntries(built.map((t) => [t.package.replace('@lc/', ''), t.hash]));
}
const changed = (before: Record<string, string>, after: Record<string, string>): string[] =>
  Object.keys(after)
    .filter((name) => before[name] !== after[name])
    .sort();
/** Which packages are built again after an edit. */
function after(edit: () => void, task?: string): string[] {
  const before = hashes(task);
  edit();
  return changed(before, hashes(task));
}
const touch = (file: string): void => appendFileSync(join(copy, file), '\n// edited\n');

describe('build:native', () => {
  it('nothing changed: the same hashes, of every package with an addon', () => {
    const first = hashes();
    expect(Object.keys(first).sort()).toEqual(nativePackages);
    expect(hashes()).toEqual(first);
  });

  it.each([HEADER, 'native/target.gypi', 'native/build.cjs', 'native/nvcc.cjs'])('%s: every addon', (file) => {
    expect(after(() => touch(file))).toEqual(nativePackages);
  });

  it.each(nativePackages)('a source of %s: that addon alone', (name) => {
    expect(after(() => touch(`packages/${name}/native/addon.cc`))).toEqual([name]);
  });

  it('a new source file: its addon', () => {
    expect(after(() => writeFileSync(join(copy, 'packages/attention/native/new.cu'), '// a kernel\n'))).toEqual(['attention']);
  });

  it('TypeScript, READMEs and tests: none', () => {
    expect(
      after(() => {
        touch('packages/tensor/src/index.ts');
        touch('packages/attention/README.md');
        touch('packages/attention/test/attention.test.ts');
        touch('test/vitest.config.ts');
      }),
    ).toEqual([]);
  });

  it('what building leaves behind (native/build, prebuilds): none', () => {
    expect(
      after(() => {
        cpSync(join(copy, 'native'), join(copy, 'packages/attention/native/build'), { recursive: true });
        cpSync(join(copy, 'native'), join(copy, 'packages/attention/prebuilds'), { recursive: true });
      }),
    ).toEqual([]);
  });

  it.each([
    ['LCTX_CUDA', '1'],
    ['LCTX_CUDA_ARCHS', '80,90a'],
    ['CXX', 'clang++'],
    ['CXXFLAGS', '-g'],
  ])('%s in the environment: every addon', (name, value) => {
    expect(changed(hashes(), hashes('build:native', { [name]: value }))).toEqual(nativePackages);
  });

  it('another list of CUDA targets: every addon', () => {
    const one = hashes('build:native', { LCTX_CUDA_ARCHS: '80' });
    expect(changed(one, hashes('build:native', { LCTX_CUDA_ARCHS: '90a' }))).toEqual(nativePackages);
  });

  it('another compiler, as .toolchain tells: every addon', () => {
    expect(after(() => writeFileSync(join(copy, '.toolchain'), 'g++ 13\ncpu only\n'))).toEqual(nativePackages);
  });

  it('.toolchain names the compiler, and with CUDA the targets', () => {
    const toolchain = (env: Record<string, string>): string => {
      const script = `console.log(require(${JSON.stringify(join(root, 'native/detect.cjs'))}).toolchain())`;
      const { stdout } = spawnSync(process.execPath, ['-e', script], { encoding: 'utf8', env: { ...process.env, LCTX_CUDA: '0', ...env } });
      return stdout;
    };
    expect(toolchain({})).toMatch(/\d+\.\d+[\s\S]*cpu only[\s\S]*node ABI \d+/);
    expect(toolchain({ CXX: 'false' })).not.toBe(toolchain({}));
  });
});

describe('build', () => {
  it("an edit of one package's TypeScript: that package and those that depend on it", () => {
    const again = after(() => touch('packages/qlora/src/adamw.ts'), 'build');
    expect(again).toEqual(expect.arrayContaining(['qlora', 'models', 'trainer']));
    for (const name of ['tensor', 'attention', 'chunked-ce', 'tiled-mlp', 'offload-ckpt', 'data']) expect(again).not.toContain(name);
  });
});
