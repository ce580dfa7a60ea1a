// Answers build questions for gyp and turbo: `cuda` (0/1), `home`, `archs`, `key`, `version`, or `toolchain` (a text that changes with the compilers).
//   LCTX_CUDA=1 builds CUDA code (a missing toolkit is an error), =0 never; otherwise it is built when an NVIDIA driver is present.
//   LCTX_CUDA_ARCHS=80,90a picks targets; `release` all of them; default: this machine's cards.
//   CUDA_HOME or CUDA_PATH, when set, is the only place looked at.
const { execFileSync } = require('node:child_process');
const { createHash } = require('node:crypto');
const { existsSync, readFileSync } = require('node:fs');
const { dirname, join } = require('node:path');

// One cubin a family: sm_80 code runs as it is on 8.6 and 8.9, sm_100 on 10.3, sm_120 on 12.1, and no kernel of ours is tuned or written for those alone.
// `90a` is for 9.0 only. PTX of 120 (native/nvcc.cjs) is for what comes later.
const RELEASE_ARCHS = '80,90a,100,120';
const run = (command, args) => {
  try {
    return execFileSync(command, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] });
  } catch {
    return '';
  }
};

function cudaHome() {
  const wish = process.env.CUDA_HOME || process.env.CUDA_PATH;
  const fromPath = run('sh', ['-c', 'command -v nvcc']).trim();
  const candidates = wish ? [wish] : [fromPath && dirname(dirname(fromPath)), '/usr/local/cuda', '/opt/cuda'];
  return candidates.find((home) => home && existsSync(join(home, 'bin/nvcc')) && existsSync(join(home, 'include/cuda_runtime.h'))) ?? '';
}

const hasDriver = () => existsSync('/proc/driver/nvidia/version') || existsSync('/dev/nvidiactl');

/** Whether CUDA code is built, and in one line why not. */
function cuda() {
  const wish = process.env.LCTX_CUDA;
  if (wish === '0') return { on: false, why: '' };
  const wanted = wish === '1' || hasDriver();
  if (!wanted) return { on: false, why: '[lc] no NVIDIA driver here: building CPU-only addons (LCTX_CUDA=1 builds CUDA code anyway)' };
  if (cudaHome()) return { on: true, why: '' };
  const message = '[lc] no CUDA toolkit found (set CUDA_HOME): building CPU-only addons; device "cuda" will not be available';
  if (wish === '1') {
    const where = process.env.CUDA_HOME || process.env.CUDA_PATH;
    throw new Error(
      `[lc] LCTX_CUDA=1, but no CUDA toolkit was found${where ? ` in ${where}` : ''}: install nvcc 13, or set CUDA_HOME to where it is`,
    );
  }
  return { on: false, why: message };
}

function archs() {
  const wish = process.env.LCTX_CUDA_ARCHS;
  const list = wish === 'release' ? RELEASE_ARCHS : wish;
  if (list) {
    const items = list
      .split(',')
      .map((a) => a.trim())
      .filter(Boolean);
    const bad = items.find((a) => !/^\d{2,3}[af]?$/.test(a));
    if (bad || items.length === 0) throw new Error(`[lc] LCTX_CUDA_ARCHS=${wish}: expected a list like 80,90a or 'release'`);
    return items;
  }
  const found = run('nvidia-smi', ['--query-gpu=compute_cap', '--format=csv,noheader'])
    .split('\n')
    .map((line) => line.trim().replace('.', ''))
    .filter((a) => /^\d+$/.test(a));
  const own = [...new Set(found)].map((a) => (a === '90' ? '90a' : a)).sort();
  return own.length > 0 ? own : RELEASE_ARCHS.split(',');
}

const version = (command) => run(command, ['--version']).trim();
const nvccVersion = () => (cudaHome() ? version(join(cudaHome(), 'bin/nvcc')) : 'no nvcc');

function key() {
  if (!cuda().on) return 'cpu';
  const script = readFileSync(join(__dirname, 'nvcc.cjs'));
  return createHash('sha256')
    .update(archs().join())
    .update(nvccVersion())
    .update(process.env.LCTX_LINEINFO ?? '')
    .update(script)
    .digest('hex')
    .slice(0, 12);
}

/** What turbo hashes besides files: compilers come and go without any file of the repository changing. */
function toolchain() {
  const { on } = cuda();
  const compiler = run('sh', ['-c', `${process.env.CXX || 'g++'} --version`]).split('\n')[0]; // CXX may be two words: ccache g++
  return `${compiler}\n${on ? `${nvccVersion()}\narchs ${archs().join()}` : 'cpu only'}\nnode ABI ${process.versions.modules}\n`;
}

const answers = {
  cuda: () => (cuda().on ? '1' : '0'),
  home: () => cudaHome() || '/nonexistent',
  archs: () => (cuda().on ? archs().join() : ''),
  key,
  version: () => JSON.parse(readFileSync(join(process.cwd(), '../package.json'), 'utf8')).version,
  toolchain,
  why: () => cuda().why,
};
module.exports = { archs, cuda, cudaHome, toolchain };
if (require.main === module) {
  const answer = answers[process.argv[2]];
  if (!answer) throw new Error(`detect.cjs: unknown question ${process.argv[2]}`);
  try {
    process.stdout.write(answer());
  } catch (error) {
    console.error(error.message);
    process.exitCode = 1;
  }
}
