"""Publish, find and pull adapters: cards, the client side, and the hub that runs on one's own machine."""
