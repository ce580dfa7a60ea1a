// `npm run release:build [-- --clean]`: every addon as it is published, for linux-x64: one file of CPU code and CUDA code of all release targets
// (native/detect.cjs), laid where prebuildify would lay it. Then dist, and the checks of addon.mjs and of the tarballs' sizes.
// LCTX_CUDA_ARCHS=80,90a builds fewer targets; LCTX_CUDA=0 none: for working on this, not for publishing.
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { bin, install, root, run, turbo } from '../lib.mjs';
import { GLIBC_FLOOR, inspect, TARBALL_LIMIT } from './addon.mjs';

process.env.LCTX_CUDA ??= '1';
process.env.LCTX_CUDA_ARCHS ??= 'release';
process.env.LCTX_LINEINFO = '0';
const { archs } = createRequire(import.meta.url)('../../native/detect.cjs');
const targets = process.env.LCTX_CUDA === '0' ? null : archs();

const packages = readdirSync(join(root, 'packages'));
const native = packages.filter((name) => existsSync(join(root, 'packages', name, 'native/binding.gyp')));
const prebuild = (name) => join(root, 'packages', name, 'prebuilds/linux-x64', `@lc+${name}.glibc.node`);
const mb = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;

install();
console.log(
  `targets ${targets ? `${targets.join(', ')} and PTX` : 'none: CPU code only, nothing to publish'}; glibc ${GLIBC_FLOOR} or newer`,
);
const started = performance.now();
const seconds = new Map();
for (const name of native) {
  const from = performance.now();
  if (process.argv.includes('--clean')) rmSync(join(root, 'packages', name, 'native/build'), { recursive: true, force: true });
  rmSync(join(root, 'packages', name, 'prebuilds'), { recursive: true, force: true });
  run(process.execPath, ['native/build.cjs', `packages/${name}`]);
  seconds.set(name, (performance.now() - from) / 1e3);
}
const minutes = (performance.now() - started) / 60e3;
turbo(['build']); // finds the addons built

const dir = mkdtempSync(join(tmpdir(), 'lc-release-'));
const rows = [];
const problems = [];
try {
  execFileSync(bin('pnpm'), ['--filter', './packages/*', '-r', 'pack', '--pack-destination', dir], {
    cwd: root,
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  for (const name of packages) {
    const { version } = JSON.parse(readFileSync(join(root, 'packages', name, 'package.json'), 'utf8'));
    const { size } = statSync(join(dir, `lc-${name}-${version}.tgz`));
    if (size > TARBALL_LIMIT) problems.push(`@lc/${name}: the tarball has ${mb(size)}, at most ${mb(TARBALL_LIMIT)} are allowed`);
    const row = { package: `@lc/${name}`, tarball: mb(size) };
    rows.push(row);
    if (!native.includes(name)) continue;
    const addon = inspect(name, prebuild(name), { version, targets });
    problems.push(...addon.problems.map((problem) => `${prebuild(name)} ${problem}`));
    Object.assign(row, {
      addon: mb(statSync(prebuild(name)).size),
      'GPU code': [...addon.code].map(([target, bytes]) => `${target} ${mb(bytes)}`).join(', '),
      glibc: addon.glibc,
      'built in': `${seconds.get(name).toFixed(0)} s`,
    });
  }
} finally {
  rmSync(dir, { recursive: true, force: true });
}
console.table(rows);
console.log(`addons built in ${minutes.toFixed(1)} min`);
for (const problem of problems) console.error(`[lc] ${problem}`);
if (problems.length > 0) process.exit(1);
