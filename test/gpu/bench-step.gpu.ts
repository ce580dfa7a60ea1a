/**
 * One training step of a model with random weights of real dimensions: `./run bench step [--model gpt-oss-20b] [--layers L] --tokens N [--chunk C] [--host]`.
 * A short warm-up step, then one timed step.
 */
import { parseArgs } from 'node:util';
import { syntheticModel, TrainingSession } from '@lc/models';
import { AdamW } from '@lc/qlora';
import { cublasLt, defaultStream, deviceMemory, devices, memInfo, resetPeak, Scope, Workspace } from '@lc/tensor';

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;

export async function benchStep(argv: string[]): Promise<void> {
  const { values } = parseArgs({
    args: argv,
    options: {
      model: { type: 'string', default: 'gpt-oss-20b' },
      layers: { type: 'string' },
      tokens: { type: 'string', default: '8192' },
      chunk: { type: 'string', default: '8192' },
      tile: { type: 'string', default: '2048' },
      'loss-chunk': { type: 'string', default: '1024' },
      host: { type: 'boolean', default: false },
    },
  });
  const tokens = Number(values.tokens);
  const chunk = Math.min(tokens, Number(values.chunk));
  using scope = new Scope();
  console.log(
    `${devices().find((d) => d.device === 'cuda:0')?.name}; ${values.model}, ${values.layers ?? 'all'} layers, ${tokens} tokens in chunks of ${chunk}; cuBLASLt: ${cublasLt() ? 'yes' : 'no'}`,
  );
  const start = performance.now();
  const model = scope.own(
    await syntheticModel(values.model, {
      device: 'cuda',
      loadIn4bit: true,
      tile: Number(values.tile),
      lora: { r: 8, loraAlpha: 16, targetModules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] },
      ...(values.layers ? { layers: Number(values.layers) } : {}),
    }),
  );
  await defaultStream('cuda').sync();
  const trainable = model.parameters.reduce((sum, p) => sum + p.value.numel, 0);
  console.log(
    `built in ${((performance.now() - start) / 1000).toFixed(1)} s: ${gib(deviceMemory('cuda').liveBytes)} of weights, ${trainable} trainable parameters`,
  );
  const ws = scope.own(new Workspace({ device: 'cuda' }));
  const session = scope.own(
    new TrainingSession({
      model,
      tokens,
      chunk,
      lossChunk: Number(values['loss-chunk']),
      ws,
      storeOptions: values.host ? { deviceBytes: 0 } : {},
    }),
  );
  const optimizer = scope.own(new AdamW(model.parameters, { lr: 1e-4 }));
  const sequence = (n: number) => {
    const inputIds = Int32Array.from({ length: n }, (_, i) => (i * 7919) % 200000);
    return { inputIds, labels: inputIds };
  };
  await session.step(sequence(Math.min(tokens, 1024)));
  optimizer.zeroGrad();
  resetPeak();
  const phases = new Map<string, number>();
  let last = performance.now();
  const from = last;
  const { loss } = await session.step(sequence(tokens), {
    onProgress: ({ phase }) => {
      const now = performance.now();
      phases.set(phase, (phases.get(phase) ?? 0) + now - last);
      last = now;
    },
  });
  const { gradNorm } = optimizer.step({ maxGradNorm: 1 });
  const seconds = (performance.now() - from) / 1000;
  const { totalBytes, freeBytes } = memInfo('cuda');
  console.log(
    `step ${seconds.toFixed(2)} s, ${Math.round(tokens / seconds)} tokens/s; loss ${loss.toFixed(4)}, gradient norm ${gradNorm.toExponential(2)}`,
  );
  console.log(
    `host time by phase (launches run ahead by two chunks): ${[...phases].map(([name, ms]) => `${name} ${(ms / 1000).toFixed(2)} s`).join(', ')}`,
  );
  console.log(
    `peak ${gib(deviceMemory('cuda').peakBytes)} allocated; driver: ${gib(totalBytes - freeBytes)} in use or reserved; host ${gib(deviceMemory('host').peakBytes)}`,
  );
  for (const [label, c] of Object.entries(deviceMemory('cuda').byLabel))
    if (c.peakBytes > 1 << 26) console.log(`  ${label.padEnd(14)} ${gib(c.peakBytes)}`);
}
