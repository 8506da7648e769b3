"""Material to learn a topology on: sequences of tokens of texts, and documents of facts and questions."""
