// `npm run bundle`: one folder (.bundle) of at most 60 MB that runs the lc command, the GPU tests and the benches on any x86-64 Linux with an NVIDIA driver and
// nothing else: node, addons, one script. Build CUDA code by LCTX_CUDA=1 LCTX_CUDA_ARCHS=80,90a npm run bundle; LCTX_CUDA_ARCHS=release: every target of a release.
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
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
  define: { __LC_VERSION__: JSON.stringify(JSON.parse(readFileSync(join(root, 'packages/trainer/package.json'), 'utf8')).version) },
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
// Another node, another name: an older bundle's must not be taken for this one's.
const stamp = createHash('sha256')
  .update(readFileSync(join(out, 'node.xz')))
  .digest('hex')
  .slice(0, 12);
writeFileSync(
  join(out, 'run'),
  `#!/bin/sh
# ./run test | parity DIR | bench ... | train CONFIG | quickstart MODEL_DIR TEXT_DIR; ./run --help says more.
set -e
here=$(cd "$(dirname "$0")" && pwd)
node=$here/node
if [ ! -x "$node" ]; then
  # Unpacked once per user and build of node.
  node=\${TMPDIR:-/tmp}/lc-bundle-node-$(id -u)-${stamp}
  if [ ! -x "$node" ]; then
    if command -v xz > /dev/null; then xz -dc "$here/node.xz" > "$node.$$"
    elif command -v python3 > /dev/null; then python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$here/node.xz" "$node.$$"
    elif command -v busybox > /dev/null; then busybox unxz -c "$here/node.xz" > "$node.$$"
    else echo "unpacking $here/node.xz needs xz, python3 or busybox; or put an executable node (20.19 or newer) beside it" >&2; exit 1
    fi
    chmod +x "$node.$$" && mv "$node.$$" "$node"
  fi
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
const LIMIT = 60e6;
const total = size(out);
const parts = readdirSync(out).map(
  (name) =>
    `${name} ${((statSync(join(out, name)).isDirectory() ? size(join(out, name)) : statSync(join(out, name)).size) / 1e6).toFixed(1)}`,
);
console.log(`${out}: ${(total / 1e6).toFixed(1)} MB (${parts.join(', ')})`);
if (total > LIMIT) {
  console.error(`[lc] the bundle may take ${LIMIT / 1e6} MB; compile fewer targets (LCTX_CUDA_ARCHS)`);
  process.exit(1);
}
