"""The gate: does the candidate know the new, and does it still know the old?"""
