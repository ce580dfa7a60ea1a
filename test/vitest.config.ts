import { mergeConfig } from 'vitest/config';
import shared from '../vitest.shared.mjs';
import { markdownSnippets } from './snippets.mjs';

export default mergeConfig(shared, { plugins: [markdownSnippets()], test: { include: ['*/**/*.test.ts'] } });
