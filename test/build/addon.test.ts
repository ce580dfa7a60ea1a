/** scripts/release/addon.mjs: what a published addon must be, and that those built here are. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { buildInfo, expectedCode, gpuCode, inspect } from '../../scripts/release/addon.mjs';
import { readManifest } from '../pack/install.js';
import { native, root } from './workspace.js';

const addonOf = (name: string): string => join(root, 'packages', name, 'prebuilds/linux-x64', `@lc+${name}.glibc.node`);
const unbuilt = native.filter((name) => !existsSync(addonOf(name)));
if (unbuilt.length > 0) throw new Error(`not built: ${unbuilt.join(', ')}; npm run setup first`);

/** A fat binary as nvcc writes it, of codes of some bytes each. */
function fatBinary(...codes: { ptx: boolean; arch: number; bytes: number }[]): Buffer {
  const parts = codes.map(({ ptx, arch, bytes }) => {
    const part = Buffer.alloc(64 + bytes);
    part.writeUInt16LE(ptx ? 1 : 2, 0);
    part.writeUInt32LE(64, 4);
    part.writeBigUInt64LE(BigInt(bytes), 8);
    part.writeUInt32LE(arch, 28);
    return part;
  });
  const body = Buffer.concat(parts);
  const head = Buffer.alloc(16);
  head.writeUInt32LE(0xba55ed50, 0);
  head.writeUInt16LE(1, 4);
  head.writeUInt16LE(16, 6);
  head.writeBigUInt64LE(BigInt(body.length), 8);
  return Buffer.concat([head, body]);
}

describe('GPU code in a file', () => {
  it('is found wherever it lies, summed by target', () => {
    const chance = Buffer.from([0x50, 0xed, 0x55, 0xba, 1, 0, 9, 9]); // the magic and no header
    const file = Buffer.concat([
      chance,
      fatBinary({ ptx: false, arch: 80, bytes: 100 }, { ptx: true, arch: 120, bytes: 40 }),
      Buffer.alloc(24),
      fatBinary({ ptx: false, arch: 80, bytes: 8 }, { ptx: false, arch: 90, bytes: 16 }),
      chance,
    ]);
    expect(Object.fromEntries(gpuCode(file))).toEqual({ sm_80: 64 + 100 + 64 + 8, sm_90: 64 + 16, compute_120: 64 + 40 });
  });
  it('of a list of targets: a cubin each, PTX of the last one without a suffix', () => {
    expect(expectedCode(['80', '90a', '100', '120'])).toEqual(['sm_80', 'sm_90', 'sm_100', 'sm_120', 'compute_120']);
    expect(expectedCode(['80', '90a'])).toEqual(['sm_80', 'sm_90', 'compute_80']);
    expect(expectedCode(['90a'])).toEqual(['sm_90']);
  });
});

it.each(native)('the addon of %s could be published', (name) => {
  const file = addonOf(name);
  const targets = buildInfo(readFileSync(file))?.cudaTargets?.split(',') ?? null;
  expect(inspect(name, file, { version: readManifest(join(root, 'packages', name)).version, targets }).problems).toEqual([]);
});

it('what is wrong with a file is said, all of it', () => {
  const dir = mkdtempSync(join(tmpdir(), 'lc-addon-'));
  try {
    const file = join(dir, 'addon.node');
    const bytes = readFileSync(addonOf('qlora'));
    const at = bytes.indexOf('"version":"') + 11;
    bytes.write('7', at, 'latin1');
    writeFileSync(file, bytes);
    const { version } = readManifest(join(root, 'packages/qlora'));
    const { problems } = inspect('tensor', file, { version, targets: ['70'] });
    expect(problems).toEqual([
      expect.stringContaining(`says version 7${version.slice(1)}, its package has ${version}`),
      expect.stringMatching(/says targets .*, wanted 70/),
      expect.stringMatching(/has no GPU code for sm_70, compute_70/),
      expect.stringMatching(/exports .*, wanted .*lctx_tensor_api_v1/),
    ]);
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
});
