"""A Q-probe inside other tools, a module each; `docs/ELSEWHERE.md` shows them."""
