/** The bundle's program: `test [filter]` or `bench gemm`. */
import { benchGemm } from './bench-gemm.gpu.js';
import { runTests } from './harness.js';
import './tensor.gpu.js';
import './ops.gpu.js';

async function main([command, what = '']: string[]): Promise<number> {
  if (command === 'test') return (await runTests(what)) ? 0 : 1;
  if (command === 'bench' && what === 'gemm') {
    await benchGemm();
    return 0;
  }
  console.error('usage: ./run test [filter] | ./run bench gemm');
  return 2;
}

main(process.argv.slice(2)).then((code) => process.exit(code));
