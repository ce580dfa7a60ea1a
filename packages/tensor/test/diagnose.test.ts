import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { type Attempt, diagnose, explain, fileProblem, here, packageManager, updateCommand, type Where } from '../src/diagnose.js';
import { buildInfo, loadAddon } from '../src/index.js';

const addon = join(dirname(dirname(fileURLToPath(import.meta.url))), 'prebuilds/linux-x64/@lc+tensor.glibc.node');
const home = mkdtempSync(join(tmpdir(), 'lc-diagnose-'));
afterAll(() => rmSync(home, { recursive: true, force: true }));

let made = 0;
/** A project with this lockfile, and @lc/x in it: these files of 12 bytes. */
function installed(files: readonly string[] = [], lock = 'package-lock.json'): string {
  const project = join(home, `project-${made++}`);
  const root = join(project, 'node_modules/@lc/x');
  mkdirSync(join(root, 'dist'), { recursive: true });
  writeFileSync(join(project, lock), '');
  writeFileSync(join(root, 'package.json'), '{ "name": "@lc/x", "version": "1.2.3" }');
  for (const file of files) {
    mkdirSync(dirname(join(root, file)), { recursive: true });
    writeFileSync(join(root, file), 'not an addon');
  }
  return root;
}
const linux: Where = { platform: 'linux', arch: 'x64', glibc: '2.36', pnp: null, cwd: home, env: {} };
const because = (attempt: Partial<Attempt>, where: Partial<Where> = {}) =>
  diagnose({ packageName: '@lc/x', root: installed(), file: null, cause: new Error('gone'), ...attempt }, { ...linux, ...where });
const reinstall = (command: string) => expect.stringMatching(`install the package again \\(${command}`);

describe('no binary', () => {
  it.each([
    ['package-lock.json', 'npm install --force'],
    ['pnpm-lock.yaml', 'pnpm install --force'],
    ['yarn.lock', 'yarn install --force'],
    ['bun.lock', 'bun install --force'],
  ])('the folder of binaries was left out, in a project with %s', (lock, command) => {
    const { reasons, fixes } = because({ root: installed([], lock) });
    expect(reasons).toEqual([expect.stringMatching(/prebuilds is missing: binaries lie in the package itself/)]);
    expect(fixes).toEqual([reinstall(command)]);
  });

  it('another platform or processor, and what is there', () => {
    const root = installed(['prebuilds/linux-x64/@lc+x.glibc.node']);
    const { reasons, fixes } = because({ root }, { platform: 'darwin', arch: 'arm64', glibc: null });
    expect(reasons).toEqual([
      'this is darwin-arm64, and binaries are published for linux-x64',
      expect.stringMatching(/has linux-x64\/@lc\+x\.glibc\.node$/),
    ]);
    expect(fixes[0]).toMatch(/Linux on x86-64/);
    expect(because({}, { arch: 'arm64' }).reasons[0]).toMatch(/^this is linux-arm64/);
  });

  it('musl, and a glibc that is too old', () => {
    const musl = because({}, { glibc: null });
    expect(musl.reasons[0]).toMatch(/another C library than glibc \(musl, as in Alpine\).* need glibc 2\.34/);
    expect(musl.fixes[0]).toMatch(/node:22-bookworm-slim instead of node:22-alpine/);
    expect(because({}, { glibc: '2.31' }).reasons[0]).toBe('this system has glibc 2.31, and binaries need 2.34 or newer');
    for (const glibc of ['2.34', '2.100', '3.0']) expect(because({}, { glibc }).reasons).toHaveLength(1);
  });

  it('a bundle, in which the code lies far from its package', () => {
    const root = join(home, 'app');
    mkdirSync(root, { recursive: true });
    const { reasons, fixes } = because({ root });
    expect(reasons).toEqual([`${root} is not the folder of @lc/x: its code was bundled or moved away from its binary`]);
    expect(fixes[0]).toMatch(/--external:'@lc\/\*'.*LCTX_ADDON_DIR/);
  });

  it("Yarn's Plug'n'Play", () => {
    const root = join(home, '.yarn/cache/@lc-x-npm-1.2.3.zip/node_modules/@lc/x');
    const { reasons, fixes } = because({ root }, { pnp: '3' });
    expect(reasons.at(-1)).toMatch(/Plug'n'Play keeps @lc\/x in a zip/);
    expect(fixes.at(-1)).toMatch(/"dependenciesMeta": \{ "@lc\/x": \{ "unplugged": true \} \}/);
  });

  it('node-gyp-build is not installed', () => {
    const cause = Object.assign(new Error("Cannot find module 'node-gyp-build'"), { code: 'MODULE_NOT_FOUND' });
    expect(because({ cause }).reasons.at(-1)).toMatch(/^node-gyp-build, which finds the binary, is not installed: Cannot find/);
  });

  it('LCTX_ADDON_DIR is wrong', () => {
    const folder = join(home, 'addons');
    expect(because({}, { env: { LCTX_ADDON_DIR: folder } }).reasons).toEqual([`LCTX_ADDON_DIR is ${folder}, which does not exist`]);
    mkdirSync(folder);
    expect(because({}, { env: { LCTX_ADDON_DIR: folder } })).toEqual({
      reasons: [`LCTX_ADDON_DIR is ${folder}, which has no @lc+x.glibc.node`],
      fixes: ['copy @lc+x.glibc.node there, or unset LCTX_ADDON_DIR'],
    });
  });
});

describe('a binary that does not load', () => {
  const copy = (name: string, change: (file: string) => void): string => {
    const file = join(home, name);
    copyFileSync(addon, file);
    change(file);
    return file;
  };

  it('what a file is', () => {
    expect(fileProblem(addon, 'x64')).toBeNull();
    expect(fileProblem(addon, 'arm64')).toBe('is for x64, and this Node is arm64');
    expect(fileProblem(join(home, 'nowhere'), 'x64')).toMatch(/^cannot be read: ENOENT/);
    expect(
      fileProblem(
        copy('empty', (file) => truncateSync(file, 0)),
        'x64',
      ),
    ).toBe('is empty');
    const { length } = readFileSync(addon);
    expect(
      fileProblem(
        copy('cut', (file) => truncateSync(file, 100_000)),
        'x64',
      ),
    ).toMatch(/^is cut off: 100000 of at least \d+ bytes$/);
    expect(length).toBeGreaterThan(100_000);
    const pointer = copy('pointer', (file) =>
      writeFileSync(file, 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n'),
    );
    expect(fileProblem(pointer, 'x64')).toMatch(/^is no Linux library: \d+ bytes that begin with 'version https:/);
  });

  it('what the loader says: a newer C library, a missing one, a file system without exec', () => {
    const said = (message: string) => because({ file: addon, cause: new Error(message) });
    expect(said("/lib/libc.so.6: version `GLIBC_2.38' not found (required by x.node)").reasons[0]).toBe(`${addon} needs GLIBC_2.38`);
    expect(said('libgomp.so.1: cannot open shared object file: No such file').reasons[0]).toBe(
      `${addon} needs libgomp.so.1, which is not installed`,
    );
    expect(said('x.node: failed to map segment from shared object').fixes[0]).toMatch(/noexec/);
    expect(said('something else').reasons).toEqual(['the loader said: something else']);
  });
});

it('one message: every reason, then the fixes', () => {
  const { reasons, fixes } = because({ root: installed([], 'pnpm-lock.yaml') }, { glibc: null });
  expect(reasons).toHaveLength(2);
  expect(explain('@lc/x: no native binary for linux-x64', { reasons, fixes }).split('\n')).toEqual([
    '@lc/x: no native binary for linux-x64:',
    `  - ${reasons[0]}`,
    `  - ${reasons[1]}`,
    'To fix it:',
    `  - ${fixes[0]}`,
    `  - ${fixes[1]}`,
  ]);
});

it('the package manager: by lockfile, then by who started the process', () => {
  expect(packageManager(installed([], 'yarn.lock'), linux)).toBe('yarn');
  const bare = { cwd: '/', env: { npm_config_user_agent: 'pnpm/10.1.0 npm/? node/v22' } };
  expect(packageManager('/nowhere/x', bare)).toBe('pnpm');
  expect(packageManager('/nowhere/x', { cwd: '/', env: {} })).toBe('npm');
  expect(updateCommand(installed([], 'pnpm-lock.yaml'), linux)).toBe('pnpm update "@lc/*"');
});

describe('loadAddon', () => {
  buildInfo(); // the core itself, before LCTX_ADDON_DIR is changed
  const load = (root: string) => () => loadAddon({ packageName: '@lc/x', from: join(root, 'dist/index.js') })();
  afterEach(() => {
    delete process.env.LCTX_ADDON_DIR;
  });

  it('throws typed errors with all of it', () => {
    expect(load(installed())).toThrow(
      expect.objectContaining({
        code: 'ERR_LC_NO_PREBUILD',
        message: expect.stringMatching(/^@lc\/x: no native binary for linux-x64:\n {2}- .*is missing.*\nTo fix it, install/),
      }),
    );
    expect(load(installed(['prebuilds/linux-x64/@lc+x.glibc.node']))).toThrow(
      expect.objectContaining({
        code: 'ERR_LC_DLOPEN',
        message: expect.stringMatching(/begin with 'not an addon'\n {2}- the loader said: /),
        cause: expect.any(Error),
      }),
    );
    process.env.LCTX_ADDON_DIR = join(home, 'wrong');
    expect(load(installed(['prebuilds/linux-x64/@lc+x.glibc.node']))).toThrow(
      expect.objectContaining({
        code: 'ERR_LC_NO_PREBUILD',
        message: expect.stringMatching(/LCTX_ADDON_DIR is .*wrong, which does not exist/),
      }),
    );
  });

  it('an addon for another ABI: both packages, versions, ABIs, places and the fix', () => {
    // A link, because what it points to is loaded as JavaScript: an addon of a future major version cannot be built here.
    const folder = join(home, 'future');
    mkdirSync(folder);
    writeFileSync(
      join(folder, 'addon.cjs'),
      `module.exports = { buildInfo: { version: '3.0.0', abi: '2.0' }, init() { throw Object.assign(new TypeError('@lc/tensor has ABI v1.1 but this addon was built for v2.0'), { code: 'ERR_LC_ABI' }); } };`,
    );
    symlinkSync(join(folder, 'addon.cjs'), join(folder, '@lc+x.glibc.node'));
    process.env.LCTX_ADDON_DIR = folder;
    const root = installed([], 'pnpm-lock.yaml');
    const { version, abi } = buildInfo();
    expect(load(root)).toThrow(
      expect.objectContaining({
        name: 'LcTypeError',
        code: 'ERR_LC_ABI',
        message: expect.stringMatching(
          `^@lc/x 1\\.2\\.3, ABI 2\\.0, in ${root} does not fit @lc/tensor ${version}, ABI ${abi}, in .*/packages/tensor: .* All @lc packages share one version: pnpm update "@lc/\\*"$`,
        ),
      }),
    );
  });

  it('knows where it is', () => {
    expect(here()).toMatchObject({ platform: 'linux', arch: 'x64', glibc: expect.stringMatching(/^2\.\d+$/), pnp: null });
  });
});
