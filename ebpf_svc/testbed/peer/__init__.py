"""The program that runs inside a host of the testbed: answers requests and makes them.

Standard library only and nothing imported from the rest of the package, so that it starts in 30 ms.
Told what to do by JSON lines on standard input; `control.Peer` is the other end.
"""
