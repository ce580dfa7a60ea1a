import { describe, expect, it } from 'vitest';
import { deviceMemory, Workspace } from '../src/index.js';
import { expectNoLeaks } from '../src/testing.js';

expectNoLeaks();

describe('Workspace', () => {
  it('gives the same memory again after a reset, 256-byte aligned', () => {
    using ws = new Workspace();
    const mark = ws.mark();
    const a = ws.alloc([3]);
    const b = ws.alloc([5], 'u8');
    expect([a.byteOffset, b.byteOffset, a.dtype]).toEqual([0, 256, 'f32']);
    ws.reset(mark);
    expect(ws.alloc([7]).byteOffset).toBe(0);
  });

  it('grows once, then allocates nothing', () => {
    using ws = new Workspace({ label: 'steady' });
    const step = () => {
      ws.scoped(() => {
        for (let i = 0; i < 5; i++) ws.scoped(() => ws.alloc([(i + 1) * 300_000]));
        ws.alloc([400_000]);
        ws.zeros([1_000_000]);
      });
    };
    step();
    const { allocations } = deviceMemory('cpu');
    for (let i = 0; i < 3; i++) step();
    expect(deviceMemory('cpu').allocations).toBe(allocations);
    expect(ws.capacity).toBe(ws.peakBytes);
  });

  it('zeros are zeros', () => {
    using ws = new Workspace();
    ws.scoped(() => ws.alloc([100]).data().fill(1));
    expect(
      ws
        .zeros([100])
        .data()
        .every((v) => v === 0),
    ).toBe(true);
  });

  it('a fixed one refuses to grow and says what is left', () => {
    using ws = new Workspace({ bytes: 1024, fixed: true, label: 'planned' });
    ws.alloc([100]);
    expect(() => ws.alloc([300])).toThrow(/'planned'.*f32\[300\] needs 1280 bytes, 512 of 1024 are left/);
  });

  it('gives back what a failing function took', () => {
    using ws = new Workspace();
    expect(() =>
      ws.scoped(() => {
        ws.alloc([10]);
        throw new Error('no');
      }),
    ).toThrow('no');
    expect(ws.usedBytes).toBe(0);
  });

  it('refuses use after dispose', () => {
    const ws = new Workspace();
    ws.dispose();
    expect(() => ws.alloc([1])).toThrow(expect.objectContaining({ code: 'ERR_LC_DISPOSED' }));
  });
});
