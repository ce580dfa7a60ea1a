/** `lc generate`: a look at what a model, or an adapter, says. Speed is not the point. */
import { LcError } from '@lc/tensor';
import { FastLanguageModel } from '../fast-language-model.js';
import { wholeNumber } from './exit.js';

interface GenerateFlags {
  adapter?: string;
  maxNewTokens: string;
  temperature: string;
  topP: string;
  topK: string;
  seed: string;
  json?: boolean;
}

export async function generateCommand(folder: string, prompt: string, flags: GenerateFlags): Promise<void> {
  const number = (name: string, text: string, low: number, high: number): number => {
    const n = Number(text);
    if (!(n >= low && n <= high)) throw new LcError('ERR_LC_CONFIG', `${name}: expected a number from ${low} to ${high}, got '${text}'`);
    return n;
  };
  const options = {
    maxNewTokens: wholeNumber('--max-new-tokens', flags.maxNewTokens, 1),
    temperature: number('--temperature', flags.temperature, 0, 100),
    topP: number('--top-p', flags.topP, 0, 1),
    topK: wholeNumber('--top-k', flags.topK),
    seed: wholeNumber('--seed', flags.seed),
  };
  const { model, tokenizer } = await FastLanguageModel.fromPretrained(folder, flags.adapter ? { adapter: flags.adapter } : {});
  using _ = model;
  const text = await model.generateText(tokenizer, prompt, options);
  process.stdout.write(flags.json ? `${JSON.stringify({ schema: 1, prompt, text })}\n` : `${text}\n`);
}
