// nvcc.cjs <input.cu> <output.o>: one object with a cubin per target and PTX of the last plain one.
const { execFileSync } = require('node:child_process');
const { mkdirSync } = require('node:fs');
const { dirname, join, resolve } = require('node:path');
const { archs, cudaHome } = require('./detect.cjs');

const [input, output] = process.argv.slice(2);
const targets = archs();
const codes = targets.map((a) => `-gencode=arch=compute_${a},code=sm_${a}`);
// `90a` code has no way forward to newer cards: PTX of the newest target without a suffix is what they compile from.
const plain = targets
  .filter((a) => /^\d+$/.test(a))
  .sort((a, b) => Number(a) - Number(b))
  .at(-1);
if (plain) codes.push(`-gencode=arch=compute_${plain},code=compute_${plain}`);
mkdirSync(dirname(output), { recursive: true });
execFileSync(
  join(cudaHome(), 'bin/nvcc'),
  [
    '-c',
    input,
    '-o',
    output,
    ...codes,
    '-std=c++17',
    '-O3',
    '--threads',
    '2',
    '--compress-mode=size',
    '--expt-relaxed-constexpr',
    ...(process.env.LCTX_LINEINFO === '1' ? ['-lineinfo'] : []), // for profilers and compute-sanitizer; it would be a third of an addon
    '-DLCTX_WITH_CUDA',
    ...(targets.includes('90a') ? ['-DLCTX_HOPPER'] : []), // lctx/hopper.cuh: host code may choose kernels that exist for sm_90a alone
    '-Xcompiler=-fPIC,-fvisibility=hidden',
    `-I${resolve('.')}`,
    `-I${resolve('../../../native/include')}`,
  ],
  { stdio: 'inherit' },
);
