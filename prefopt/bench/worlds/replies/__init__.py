"""The `replies` world: customers write about their orders, a shop replies. A person can read it, a small model can
learn it, and what a reply is worth is known exactly.

`language`: what sentences mean. `writers`: who writes them. `gold`: what a reply is worth. `annotators`: what people
would say about it. `principles`: what is against one; `assistants`: who works by them. `world`: data and base model.
"""
