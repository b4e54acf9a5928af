"""What vLLM loads. Nothing of vLLM is changed or patched.

plugin        register(): the entry point in vLLM's general plugins; other versions than the tested one are left alone
registration  what vLLM is told of us
checks        the configuration hook of our architecture: settings become tiers, what cannot work is refused
groups        TierSpec and TierManager: KV-cache groups that give blocks back (scheduler)
backend       what vLLM asks of an attention backend, and the metadata it builds at each step
step          a step's batch: what every query sees, which prompts end
pool          where vLLM stores the heads of a layer
attention     attention of one layer (workers)
compaction    cutting a prompt that has been read (workers)
model         the model: Hugging Face's, run by vLLM, with our attention
"""
