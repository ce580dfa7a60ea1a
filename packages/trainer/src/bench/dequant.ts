/** `lc bench dequant`: 4-bit weights to the compute dtype, beside a copy on the device. */

import { fillRandom } from '@lc/models';
import { Mxfp4Weight, Nf4Weight, type WeightStorage } from '@lc/qlora';
import { type DeviceLike, empty, fill, Scope } from '@lc/tensor';
import { copyRate, noise } from './bandwidth.js';
import { Clock } from './clock.js';
import { fixed, newReport, type Report, type Row, text } from './report.js';

type Format = 'NF4' | 'NF4, double' | 'MXFP4';

function weight(scope: Scope, device: DeviceLike, format: Format, shape: readonly number[]): WeightStorage {
  if (format === 'MXFP4') {
    const groups = [...shape.slice(0, -1), (shape.at(-1) as number) / 32];
    const blocks = empty([...groups, 16], { dtype: 'u8', device, label: 'bench' });
    const scales = empty(groups, { dtype: 'u8', device, label: 'bench' });
    fillRandom(blocks);
    fill(scales, 120);
    return scope.own(new Mxfp4Weight({ blocks, scales }));
  }
  using temporary = new Scope();
  const made = Nf4Weight.quantize(noise(temporary, 'cpu', shape, { std: 0.02 }), { doubleQuant: format !== 'NF4' });
  return scope.own(device === 'cpu' ? made : made.to(device));
}

export async function benchDequant(device: DeviceLike): Promise<Report> {
  const onGpu = device !== 'cpu';
  const report = newReport('dequant', device);
  const cases: readonly (readonly [Format, readonly number[], string])[] = onGpu
    ? [
        ['MXFP4', [32, 5760, 2880], "gate and up of a layer's 32 experts"],
        ['MXFP4', [32, 2880, 2880], 'down of 32 experts'],
        ['NF4, double', [4096, 2880], 'q'],
        ['NF4', [4096, 2880], 'q'],
        ['NF4, double', [14336, 4096], "Llama-3.1-8B's gate"],
      ]
    : [
        ['MXFP4', [4, 720, 480], 'experts'],
        ['NF4, double', [512, 720], 'a linear'],
        ['NF4', [512, 720], 'a linear'],
      ];
  using clock = new Clock(device);
  const rows: Row[] = [];
  for (const [format, shape, what] of cases) {
    using scope = new Scope();
    const w = weight(scope, device, format, shape);
    const out = scope.own(empty(shape, { dtype: onGpu ? 'bf16' : 'f32', device, label: 'bench' }));
    const ms = await clock.time(() => w.dequantize(out), { times: onGpu ? 5 : 1 });
    const rate = (w.nbytes + out.nbytes) / ms / 1e6;
    const peer = await copyRate(clock, device, Math.ceil((w.nbytes + out.nbytes) / 2)); // as many bytes read and written in all
    rows.push({ format, shape: shape.join(' x '), what, ms, gbPerSecond: rate, copyGbPerSecond: peer, ratio: rate / peer });
  }
  report.tables.push({
    columns: [
      ['format', text('format')],
      ['shape', text('shape')],
      ['', text('what')],
      ['ms', fixed('ms', 3)],
      ['GB/s, read and written', fixed('gbPerSecond', 0)],
      ['a copy of as many bytes', fixed('copyGbPerSecond', 0)],
      ['ratio', fixed('ratio', 2)],
    ],
    rows,
  });
  return report;
}
