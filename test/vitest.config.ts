import { mergeConfig } from 'vitest/config';
import shared from '../vitest.shared.mjs';

export default mergeConfig(shared, { test: { include: ['*/**/*.test.ts'] } });
