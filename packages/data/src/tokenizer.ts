/** Tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json and the chat template beside them. */
import { existsSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HfTokenizer } from '@huggingface/tokenizers';
import { LcError } from '@lc/tensor';

const MAX_TOKENIZER_BYTES = 256 << 20;

/** What `loadTokenizer` gives; one of your own may stand in. */
export interface Tokenizer {
  /** Ids of a text. `addSpecialTokens`: as the tokenizer's post-processor says, e.g. a BOS. */
  encode(text: string, options?: { addSpecialTokens?: boolean }): Int32Array;
  /** Text of ids. */
  decode(ids: ArrayLike<number>, options?: { skipSpecialTokens?: boolean }): string;
  readonly bosToken: string | null;
  readonly eosToken: string | null;
  readonly bosTokenId: number | null;
  readonly eosTokenId: number | null;
  readonly padTokenId: number | null;
  /** The Jinja chat template, if the folder has one. */
  readonly chatTemplate: string | null;
  readonly vocabSize: number;
}

function readJson(path: string): Record<string, unknown> {
  let text: string;
  try {
    if (statSync(path).size > MAX_TOKENIZER_BYTES)
      throw new LcError('ERR_LC_TOKENIZER', `${path}: larger than 256 MiB; is this a tokenizer?`);
    text = readFileSync(path, 'utf8');
  } catch (cause) {
    if (cause instanceof LcError) throw cause;
    throw new LcError('ERR_LC_TOKENIZER', `${path}: ${(cause as Error).message}; the model folder needs tokenizer.json`, { cause });
  }
  try {
    const value: unknown = JSON.parse(text);
    if (value === null || typeof value !== 'object' || Array.isArray(value)) throw new Error('not an object');
    return value as Record<string, unknown>;
  } catch (cause) {
    throw new LcError('ERR_LC_TOKENIZER', `${path}: not valid JSON: ${(cause as Error).message}; fetch the file again`, { cause });
  }
}

/** "<s>" or { content: "<s>" } */
function tokenText(value: unknown): string | null {
  if (typeof value === 'string') return value;
  if (value !== null && typeof value === 'object' && typeof (value as { content?: unknown }).content === 'string')
    return (value as { content: string }).content;
  return null;
}

/** chat_template.jinja wins over tokenizer_config.json; of several named ones, "default". */
function chatTemplateOf(folder: string, config: Record<string, unknown>): string | null {
  const file = join(folder, 'chat_template.jinja');
  if (existsSync(file)) return readFileSync(file, 'utf8');
  const value = config.chat_template;
  if (typeof value === 'string') return value;
  if (Array.isArray(value)) {
    const named = value.find((item: unknown) => (item as { name?: unknown } | null)?.name === 'default') as
      | { template?: unknown }
      | undefined;
    if (typeof named?.template === 'string') return named.template;
  }
  return null;
}

/**
 * Loads `tokenizer.json` and `tokenizer_config.json` of a folder.
 * @throws ERR_LC_TOKENIZER naming the file and what is wrong with it.
 */
export function loadTokenizer(folder: string): Tokenizer {
  const definition = readJson(join(folder, 'tokenizer.json'));
  const configFile = join(folder, 'tokenizer_config.json');
  const config = existsSync(configFile) ? readJson(configFile) : {};
  const vocab = (definition.model as { vocab?: unknown } | undefined)?.vocab;
  if (vocab === null || typeof vocab !== 'object') {
    throw new LcError(
      'ERR_LC_TOKENIZER',
      `${join(folder, 'tokenizer.json')}: model.vocab must be an object or a list of tokens; fetch the file again`,
    );
  }
  let tokenizer: HfTokenizer;
  try {
    tokenizer = new HfTokenizer(definition, config);
  } catch (cause) {
    throw new LcError(
      'ERR_LC_TOKENIZER',
      `${join(folder, 'tokenizer.json')}: not a tokenizer that @huggingface/tokenizers reads: ${(cause as Error).message}`,
      { cause },
    );
  }
  const idOf = (token: string | null): number | null => {
    if (token === null) return null;
    const id = tokenizer.token_to_id(token);
    if (id === undefined) throw new LcError('ERR_LC_TOKENIZER', `${configFile}: token '${token}' is not in tokenizer.json's vocabulary`);
    return id;
  };
  const bosToken = tokenText(config.bos_token);
  const eosToken = tokenText(config.eos_token);
  let vocabSize = 0;
  for (const id of tokenizer.get_vocab(true).values()) vocabSize = Math.max(vocabSize, id + 1);
  return {
    encode: (text, options = {}) => Int32Array.from(tokenizer.encode(text, { add_special_tokens: options.addSpecialTokens ?? true }).ids),
    decode: (ids, options = {}) => tokenizer.decode(Array.from(ids), { skip_special_tokens: options.skipSpecialTokens ?? true }),
    bosToken,
    eosToken,
    bosTokenId: idOf(bosToken),
    eosTokenId: idOf(eosToken),
    padTokenId: idOf(tokenText(config.pad_token)),
    chatTemplate: chatTemplateOf(folder, config),
    vocabSize,
  };
}
