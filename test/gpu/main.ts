/** The bundle's program. */
import { benchAttention } from './bench-attention.gpu.js';
import { benchGemm } from './bench-gemm.gpu.js';
import { benchRows } from './bench-rows.gpu.js';
import { benchStep } from './bench-step.gpu.js';
import { runTests } from './harness.js';
import { gpuParity } from './parity.gpu.js';
import { gpuTrain } from './train.gpu.js';
import './tensor.gpu.js';
import './ops.gpu.js';
import './attention.gpu.js';
import './large.gpu.js';
import './repeat.gpu.js';

const usage =
  'usage: ./run test [filter] | ./run parity DIR [--peer OUT_OF_PARITY_BF16.json] [--out OURS.json] | ./run bench gemm|rows|attention | ./run bench step [--tokens N] ... | ./run train MODEL_DIR TEXT_DIR [steps]';

async function main([command, what = '', ...rest]: string[]): Promise<number> {
  if (command === 'test') return (await runTests(what)) ? 0 : 1;
  if (command === 'parity' && what) {
    const option = (name: string): string | undefined => (rest.includes(name) ? rest[rest.indexOf(name) + 1] : undefined);
    return (await gpuParity(what, { peer: option('--peer'), out: option('--out') })) ? 0 : 1;
  }
  if (command === 'train' && what && rest[0]) {
    await gpuTrain(what, rest[0], Number(rest[1] ?? 60));
    return 0;
  }
  if (command === 'bench' && what === 'gemm') {
    await benchGemm();
    return 0;
  }
  if (command === 'bench' && what === 'rows') {
    await benchRows();
    return 0;
  }
  if (command === 'bench' && what === 'step') {
    await benchStep(rest);
    return 0;
  }
  if (command === 'bench' && what === 'attention') {
    await benchAttention();
    return 0;
  }
  console.error(usage);
  return 2;
}

main(process.argv.slice(2)).then(
  (code) => process.exit(code),
  (error: unknown) => {
    console.error(error);
    process.exit(1);
  },
);
