"""Portfolios from clusters of stocks: selection, weights, backtest, metrics and inference, free of Lightning."""
