"""Prompts out of messages, and what is asked of a reply.

`text` is the chat template and detokenization, `context_window` what of a prompt fits, `exchange` one chat request
with tools and structured output, `template_support` what a template can say.
"""
