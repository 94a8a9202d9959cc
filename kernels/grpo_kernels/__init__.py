"""LM-head and policy-loss ops."""
