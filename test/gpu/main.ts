/** The bundle's program: the `lc` command, and what only the bundle has (GPU tests, parity, the quickstart's fine-tune). */
import { program, runProgram } from '../../packages/trainer/src/cli/program.js';
import { runTests } from './harness.js';
import { gpuParity } from './parity.gpu.js';
import { poolParity } from './parity-pool.js';
import { gpuTrain } from './train.gpu.js';
import './tensor.gpu.js';
import './ops.gpu.js';
import './attention.gpu.js';
import './large.gpu.js';
import './memory.gpu.js';
import './odd.gpu.js';
import './repeat.gpu.js';

const lc = program('./run').description('lc, its GPU tests and its benches: needs an NVIDIA driver and nothing else');
const exit = (ok: boolean): void => {
  process.exitCode = ok ? 0 : 1;
};
lc.command('test')
  .description('every CUDA op against the CPU')
  .argument('[filter]', 'run only tests whose name contains it', '')
  .action(async (filter: string) => exit(await runTests(filter)));
lc.command('parity')
  .description("reference models in bf16 against transformers' f32")
  .argument('<folder>', 'of reference models')
  .option('--peer <file>', "what test/gpu/peers/parity_bf16.py wrote: transformers' own bf16 run")
  .option('--out <file>', 'write our side there')
  .option('--condition', 'print how much each model magnifies noise')
  .action(async (folder: string, options: { peer?: string; out?: string; condition?: boolean }) => exit(await gpuParity(folder, options)));
lc.command('parity-pool')
  .description('several parity runs of other inputs together')
  .argument('<folder>', 'with ours.X.json (parity --out) and theirs.X.json (peers/parity_bf16.py) for every X')
  .action((folder: string) => exit(poolParity(folder)));
lc.command('quickstart')
  .description("the quickstart's fine-tune on the GPU")
  .argument('<model>', 'examples/quickstart/tiny-gpt-oss')
  .argument('<texts>', 'folder of chapter_N.txt')
  .argument('[steps]', 'optimizer steps', '60')
  .action((model: string, texts: string, steps: string) => gpuTrain(model, texts, Number(steps)));

const argv = process.argv.slice(2);
runProgram(lc, argv.length === 0 ? ['--help'] : argv).then(
  (code) => process.exit(code),
  (error: unknown) => {
    console.error(error);
    process.exit(1);
  },
);
