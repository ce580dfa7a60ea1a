/** The commands of `lc`. Exit codes: 0 ok; 1 the run failed; 2 bad usage, config or data; 3 a check failed (will not fit); 130/143 stopped by a signal. */
import { LcError, LcTypeError } from '@lc/tensor';
import { Command, CommanderError } from 'commander';
import { addBench } from './bench.js';
import { doctorCommand } from './doctor.js';
import { exitCodeOf, printError } from './exit.js';
import { generateCommand } from './generate.js';
import { planCommand } from './plan.js';
import { trainCommand } from './train.js';

declare const __LC_VERSION__: string | undefined;

/** @param name as usage shows it */
export function program(name = 'lc'): Command {
  const lc = new Command(name)
    .description('Long-context fine-tuning of language models')
    .version(typeof __LC_VERSION__ === 'string' ? __LC_VERSION__ : '0.0.0-dev')
    .exitOverride()
    .configureOutput({ writeErr: (text) => process.stderr.write(text) });
  const collect = (value: string, all: string[]): string[] => [...all, value];

  lc.command('train')
    .argument('<config>', 'YAML file with axolotl names')
    .option('--set <key=value>', 'override a config key; may be repeated', collect, [])
    .option('--dry-run', 'check config, model and data and show the plan; train nothing')
    .option('--resume [folder]', 'go on from a checkpoint-N folder, or from the newest complete one')
    .option('--json', 'events as NDJSON on stdout')
    .action(trainCommand);
  lc.command('plan')
    .argument('<model>', 'model folder, or its config.json')
    .requiredOption('--tokens <n>', 'sequence length')
    .option('--device <device>', 'cpu or cuda', 'cpu')
    .option('--vram <bytes>', 'device memory to plan for, CUDA context included, e.g. 24GiB; default what is free')
    .option('--ram <bytes>', 'host memory to plan for; default what is free')
    .option('--layers-per-segment <n>', "layers per gradient checkpoint; 'auto': what makes the step fastest")
    .option('--lora-r <r>', 'LoRA rank', '16')
    .option('--json', 'one JSON object on stdout')
    .action(planCommand);
  lc.command('doctor')
    .description('what this machine has, and what would not work')
    .option('--json', 'one JSON object on stdout')
    .action(doctorCommand);
  lc.command('generate')
    .argument('<model>', 'model folder')
    .argument('<prompt>', 'text to continue')
    .option('--adapter <folder>', 'LoRA adapter (PEFT format)')
    .option('--max-new-tokens <n>', 'tokens to generate', '64')
    .option('--temperature <t>', '0 = greedy', '0')
    .option('--top-p <p>', 'nucleus sampling', '1')
    .option('--top-k <k>', 'sample from the k likeliest; 0 = all', '0')
    .option('--seed <n>', 'of the sampling', '0')
    .option('--json', 'one JSON object on stdout')
    .action(generateCommand);
  addBench(lc);
  return lc;
}

/** Parses and runs. @returns the exit code */
export async function runProgram(lc: Command, argv: readonly string[]): Promise<number> {
  try {
    await lc.parseAsync([...argv], { from: 'user' });
    return process.exitCode === undefined ? 0 : Number(process.exitCode);
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
    printError(error, argv.includes('--json'));
    return error instanceof LcError || error instanceof LcTypeError || (error as { code?: unknown }).code !== undefined
      ? exitCodeOf(error)
      : 1;
  }
}
