// `npm run bundle`: one folder (.bundle) that runs the GPU tests and benches on any x86-64 Linux with an NVIDIA driver and nothing else: node, addons, one
// script. Build CUDA code first by LCTX_CUDA=1 LCTX_CUDA_ARCHS=80,90a npm run bundle.
import { execFileSync } from 'node:child_process';
import { chmodSync, copyFileSync, cpSync, existsSync, mkdirSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, join } from 'node:path';
import { root, run } from './lib.mjs';

const out = join(root, '.bundle');
rmSync(out, { recursive: true, force: true });
mkdirSync(join(out, 'addons'), { recursive: true });

const packages = readdirSync(join(root, 'packages')).filter((name) => existsSync(join(root, 'packages', name, 'native/binding.gyp')));
const folders = [...packages.map((name) => `packages/${name}`), 'test/gpu-addon-a', 'test/gpu-addon-b'];
run(process.execPath, ['native/build.cjs', ...folders]);
for (const folder of folders) {
  const name = `@lc+${basename(folder)}.glibc.node`;
  copyFileSync(join(root, folder, 'prebuilds/linux-x64', name), join(out, 'addons', name));
}

// esbuild comes with tsup.
const esbuild = createRequire(createRequire(join(root, 'package.json')).resolve('tsup')).resolve('esbuild');
const { build } = await import(esbuild);
await build({
  entryPoints: [join(root, 'test/gpu/main.ts')],
  outfile: join(out, 'main.mjs'),
  bundle: true,
  platform: 'node',
  target: 'node20',
  format: 'esm',
  conditions: ['lc-source'],
  banner: { js: "import { createRequire as __createRequire } from 'node:module'; const require = __createRequire(import.meta.url);" },
  logLevel: 'warning',
});

// What runs beside the tests: compute-sanitizer's script, and the peers' side of the comparisons (for a machine with PyTorch).
copyFileSync(join(root, 'test/gpu/sanitize.sh'), join(out, 'sanitize'));
chmodSync(join(out, 'sanitize'), 0o755);
cpSync(join(root, 'test/gpu/peers'), join(out, 'peers'), { recursive: true, filter: (path) => !path.includes('__pycache__') });

copyFileSync(process.execPath, join(out, 'node'));
chmodSync(join(out, 'node'), 0o755);
execFileSync('strip', [join(out, 'node')]);
execFileSync('xz', ['-f', '-T0', '-6', join(out, 'node')]);
writeFileSync(
  join(out, 'run'),
  `#!/bin/sh
# ./run test | parity DIR | bench gemm | train MODEL_DIR TEXT_DIR
set -e
here=$(cd "$(dirname "$0")" && pwd)
node=$here/node
if [ ! -x "$node" ]; then
  node=\${TMPDIR:-/tmp}/lc-bundle-node-$(id -u)
  [ -x "$node" ] || { xz -dc "$here/node.xz" > "$node.$$" && chmod +x "$node.$$" && mv "$node.$$" "$node"; }
fi
LCTX_ADDON_DIR="$here/addons" exec "$node" "$here/main.mjs" "$@"
`,
);
chmodSync(join(out, 'run'), 0o755);
const size = (dir) =>
  readdirSync(dir, { withFileTypes: true }).reduce(
    (sum, e) => sum + (e.isDirectory() ? size(join(dir, e.name)) : statSync(join(dir, e.name)).size),
    0,
  );
console.log(`${out}: ${(size(out) / 2 ** 20).toFixed(1)} MiB`);
