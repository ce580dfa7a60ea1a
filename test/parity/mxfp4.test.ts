import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Mxfp4Weight } from '@lc/qlora';
import { empty, fromTypedArray, Scope } from '@lc/tensor';
import { openSafetensors } from '@lc/tensor/safetensors';
import { expectNoLeaks } from '@lc/tensor/testing';
import { expect, it } from 'vitest';
import { referenceFolder } from './reference.js';

expectNoLeaks();

const path = join(referenceFolder, 'mxfp4.safetensors');

it.runIf(existsSync(path))('MXFP4 equals transformers bit for bit', async () => {
  using scope = new Scope();
  using file = await openSafetensors(path);
  const read = async (name: string): Promise<ReturnType<typeof empty>> =>
    fromTypedArray(await file.read<Uint8Array>(name), file.info(name).shape, { label: 'mxfp4' });
  const weight = scope.own(new Mxfp4Weight({ blocks: await read('blocks'), scales: await read('scales') }));
  const [experts, outer, inner] = weight.shape as [number, number, number];
  const out = scope.own(empty(weight.shape, { dtype: 'bf16' }));
  weight.dequantize(out);
  const got = out.data<Uint16Array>();
  const want = await file.read<Uint16Array>('dequantised_bf16'); // [experts, in, out]
  expect(file.info('dequantised_bf16').shape).toEqual([experts, inner, outer]);
  let different = 0;
  for (let e = 0; e < experts; e++) {
    for (let o = 0; o < outer; o++) {
      for (let i = 0; i < inner; i++) if (got[(e * outer + o) * inner + i] !== want[(e * inner + i) * outer + o]) different++;
    }
  }
  expect(different).toBe(0);
});
