import { expectNoLeaks } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { generate, loadModel, sampleToken } from '../src/index.js';
import { fixtures, logitsOf, someIds } from './helpers.js';

expectNoLeaks();

describe.each(['llama', 'mistral-window', 'gpt-oss', 'qwen3-moe'])('generate with %s', (name) => {
  it('gives what the whole sequence gives, token by token', async () => {
    using model = await loadModel(fixtures + name, { tile: 16 });
    const prompt = someIds(21);
    const out = await generate(model, prompt, { maxNewTokens: 9, eosTokenId: [], chunk: 8 });
    expect(out).toHaveLength(9);
    const all = [...prompt, ...out];
    const logits = await logitsOf(model, all);
    const { vocabSize } = model.config;
    const greedy = all.map((_, i) => sampleToken(logits.subarray(i * vocabSize, (i + 1) * vocabSize), {}, 0));
    expect(out).toEqual(greedy.slice(prompt.length - 1, -1));
    expect(await generate(model, prompt, { maxNewTokens: 9, eosTokenId: [] })).toEqual(out);
  });
});

describe('generate', () => {
  it('stops at the end token, at a signal, and repeats for a seed', async () => {
    using model = await loadModel(`${fixtures}llama`);
    const prompt = someIds(5);
    const options = { maxNewTokens: 12, temperature: 1.5, topK: 50, topP: 0.95, seed: 7, eosTokenId: [] };
    const tokens: number[] = [];
    const out = await generate(model, prompt, { ...options, onToken: (id) => tokens.push(id) });
    expect(tokens).toEqual(out);
    expect(await generate(model, prompt, options)).toEqual(out);
    expect(await generate(model, prompt, { ...options, seed: 8 })).not.toEqual(out);
    const end = out[4] as number;
    expect(await generate(model, prompt, { ...options, eosTokenId: end })).toEqual(out.slice(0, out.indexOf(end)));
    await expect(generate(model, prompt, { ...options, signal: AbortSignal.abort() })).rejects.toMatchObject({ code: 'ERR_LC_ABORTED' });
    await expect(generate(model, [])).rejects.toMatchObject({ code: 'ERR_LC_ARGUMENT' });
    await expect(generate(model, prompt, { maxNewTokens: 0 })).rejects.toMatchObject({ code: 'ERR_LC_ARGUMENT' });
    await expect(generate(model, [9999])).rejects.toThrow();
  });
});
