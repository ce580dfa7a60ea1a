import type { Plugin } from 'vitest/config';

export function snippets(text: string): string[];
export function snippetModule(file: string, index?: number): string;
export function markdownSnippets(): Plugin;
