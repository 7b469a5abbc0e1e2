"""Images and masks: found, paired, read, checked, and cut into what the network sees."""
